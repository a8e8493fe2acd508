"""Feature columns of events, such as an action or a rating, with their values as indices.

Each column has a vocabulary that numbers its values from 1 in order of appearance; 0 stands for a missing or unknown value.
Values are texts. Numbers and booleans are converted to their text, 4.0 to 4. Existing indices stay when events are added,
and new values get the next ones.

    features.parquet    one row per value: column, value_index (from 1, without a gap), value
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.config import USER_ID, ModelConfig
from mme.data.layout import FEATURE_PREFIX, FEATURES_FILE
from mme.errors import UserError, first_line

MOST_VALUES = 1_000_000  # per column, because they are kept in memory and each has a row in the model's tables
TRAILING_ZEROS = r"^([+-]?\d+)\.0+$"


@dataclass(frozen=True)
class Features:
    """The feature columns of events and of users that batches carry; the column `user_id` is the user itself."""

    events: Sequence[str] = ()
    users: Sequence[str] = ()

    @classmethod
    def of(cls, model: ModelConfig) -> Features:
        return cls(model.event_features, model.user_features)


NO_FEATURES = Features()


class Vocabulary:
    """The values of one column and their indices."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self.numbers = {value: number for number, value in enumerate(values, 1)}

    def learn(self, column: pa.Array) -> NDArray[np.int32]:
        """The index of each value; new values get the next indices.

        Raises:
            TypeError: the column does not hold texts, numbers or booleans.
            OverflowError: the column has more than `MOST_VALUES` values.
        """
        encoded = category_texts(column).dictionary_encode()
        numbers = [self.numbers.setdefault(value, len(self.numbers) + 1) for value in encoded.dictionary.to_pylist()]
        if len(self.numbers) > MOST_VALUES:
            raise OverflowError(f"has more than {MOST_VALUES:,} different values, too many for a category")
        return _take(numbers, encoded)

    def find(self, column: pa.Array) -> NDArray[np.int32]:
        """The index of each value, 0 if it is missing or unknown; raises TypeError like `learn`."""
        encoded = category_texts(column).dictionary_encode()
        return _take([self.numbers.get(value, 0) for value in encoded.dictionary.to_pylist()], encoded)


def category_texts(column: pa.Array) -> pa.Array:
    """The values as texts, null if missing; raises TypeError for a column that cannot hold categories."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    elif not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        raise TypeError(f"holds {kind}, expected texts, numbers or booleans")
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    text = pc.replace_substring_regex(text, TRAILING_ZEROS, r"\1")
    return pc.if_else(pc.equal(text, ""), None, text)


def _take(numbers: list[int], encoded: pa.DictionaryArray) -> NDArray[np.int32]:
    # The last entry is the index of missing values.
    places = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([*numbers, 0], np.int32)[places]


def write_vocabularies(folder: Path, vocabularies: dict[str, Vocabulary]) -> None:
    """Writes features.parquet, unless there are no columns."""
    if not vocabularies:
        return
    tables = [
        pa.table(
            {
                "column": pa.array([name] * len(vocabulary.numbers), pa.string()),
                "value_index": pa.array(list(vocabulary.numbers.values()), pa.int64()),
                "value": pa.array(list(vocabulary.numbers), pa.string()),
            }
        )
        for name, vocabulary in vocabularies.items()
    ]
    pq.write_table(pa.concat_tables(tables), folder / FEATURES_FILE, compression="zstd")


def read_vocabularies(folder: Path, names: Iterable[str]) -> dict[str, Vocabulary]:
    """The vocabularies of the named columns.

    Raises:
        UserError: the file is missing or damaged.
    """
    names = list(names)
    if not names:
        return {}
    path = folder / FEATURES_FILE
    try:
        table = pq.read_table(path).sort_by("value_index")
        return {name: Vocabulary(table.filter(pc.equal(table["column"], name))["value"].to_pylist()) for name in names}
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read: {reason}; run `mme prepare` again") from error


def feature_sizes(folder: Path, info: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    """The number of indices of each column, including 0 for missing values; `user_id` has one per user and 0.

    Args:
        info: the content of dataset.json of the set in ``folder``.

    Raises:
        UserError: the set has no such column.
    """
    found: dict[str, int] = info.get("features", {})
    sizes = {name: number + 1 for name, number in found.items()} | {USER_ID: info["num_users"] + 1}
    for name in names:
        if name not in sizes:
            has = f"its columns are {', '.join(found)}" if found else "it has no feature columns"
            raise UserError(
                f"{folder}: no column {name!r}, which model.event_features or model.user_features names: {has}; "
                "--feature-columns of `mme prepare` keeps them"
            )
    return {name: sizes[name] for name in names}


def parts_column(name: str) -> str:
    """The name of a feature column in the parts, the event file and the loaders."""
    return FEATURE_PREFIX + name
