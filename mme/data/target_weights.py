"""The weight of each target in the loss, by the value of a feature column of its event.

loss.weight_column=action, loss.target_weights=[buy=1,click=0.2]    other actions are context and no targets
loss.weight_column=weight                                            the values of the column are the weights
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mme.config import LossConfig
from mme.data.event_file import Records
from mme.data.features import parts_column, read_vocabularies
from mme.errors import UserError

SHOWN_VALUES = 10


@dataclass(frozen=True)
class TargetWeights:
    """
    Attributes:
        column: the column of the events.
        by_value: (values + 1,) float32, the weight of each value index; 0, also for a missing value: no target.
    """

    column: str
    by_value: NDArray[np.float32]

    def of(self, events: Records) -> NDArray[np.float32]:
        """(events,) the weights of ``events`` as targets."""
        weights: NDArray[np.float32] = self.by_value[events[self.column]]
        return weights


def read_target_weights(folder: Path, info: dict[str, Any], loss: LossConfig) -> TargetWeights | None:
    """The weights that ``loss`` asks for in the set in ``folder``; None if all targets have the same weight.

    Raises:
        UserError: the set has no such column of categories, a value of `loss.target_weights` does not occur in it, or the
            column is to hold weights and does not, or none is above 0.
    """
    name = loss.weight_column
    if name is None:
        return None
    columns = info.get("features", {})
    if name not in columns:
        has = f"its columns are {', '.join(columns)}" if columns else "it has no feature columns"
        raise UserError(
            f"loss.weight_column: {name}: {folder} has no such column: {has}; --feature-columns of `mme prepare` keeps them"
        )
    vocabulary = read_vocabularies(folder, [name])[name]
    if vocabulary.kind != "category":
        raise UserError(
            f"loss.weight_column: {name}: was kept as {name}:{vocabulary.kind}, in buckets: expected --feature-columns {name}"
        )
    weights = np.zeros(len(vocabulary.numbers) + 1, np.float32)
    if loss.target_weights:
        named: dict[int, str] = {}
        for value, weight in loss.weight_of_value().items():
            index = int(vocabulary.find(pa.array([value]))[0])  # 4.0 is 4, as in the column
            if not index:
                known = ", ".join(list(vocabulary.numbers)[:SHOWN_VALUES])
                raise UserError(f"loss.target_weights: {value}: no event has this {name}: expected some of {known}")
            if index in named:
                raise UserError(f"loss.target_weights: {named[index]} and {value} are the same value of {name}")
            named[index] = value
            weights[index] = weight
    else:
        for value, index in vocabulary.numbers.items():
            weights[index] = _number(folder, name, value)
    if not weights.any():
        raise UserError(f"loss.weight_column: {name}: all weights are 0: expected one above 0")
    return TargetWeights(parts_column(name), weights)


def _number(folder: Path, name: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= np.finfo(np.float32).max:
        raise UserError(
            f"{folder}: column {name!r} of loss.weight_column has the value {value!r}: expected a weight from 0, or "
            "loss.target_weights with the weight of each value"
        )
    return weight
