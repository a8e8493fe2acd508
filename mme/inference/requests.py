"""What is asked of a trained model, and what it answers: histories in any of the usual shapes, and lists of items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from mme.errors import UserError, first_line

SOURCE = "histories"  # how messages name what was given


@dataclass(frozen=True)
class RecommendationRequest:
    """Histories and how to rank for them.

    Attributes:
        histories: a table with `item_ids`, `timestamps` and, if wanted, `user_id`, `request_timestamp` and the columns that
            the model reads as features.
        k: items of a list.
        exclude_seen: whether items of the history are left out.
        candidates: raw ids; only these items are ranked. None: all.
        blocked: raw ids that no list holds.
        unknown: whether items that the model does not know are left out of a history, or refused.
    """

    histories: pa.Table
    k: int = 10
    exclude_seen: bool = True
    candidates: Sequence[Any] | None = None
    blocked: Sequence[Any] = ()
    unknown: Literal["skip", "refuse"] = "skip"

    @property
    def num_histories(self) -> int:
        return int(self.histories.num_rows)


@dataclass(frozen=True)
class Answer:
    """One list per history, in the order of the request.

    Attributes:
        item_ids: raw ids, best first; fewer than k where fewer can be ranked.
        scores: cosines in [-1, 1], or in a fallback the number of events of each item.
        fallback: whether the history held no known item, so that the most popular items stand in its list.
        unknown_items: events left out because their item is unknown.
        model: which model has answered.
    """

    item_ids: list[list[Any]]
    scores: list[list[float]]
    fallback: list[bool]
    unknown_items: int
    model: str


def as_table(histories: Any) -> pa.Table:
    """Histories as a table.

    Args:
        histories: a pyarrow Table, a pandas or polars frame (anything that exports an Arrow stream), or a list of dicts.

    Raises:
        UserError: it is something else, it is empty, or a column mixes types.
    """
    try:
        if isinstance(histories, pa.Table):
            table = histories
        elif isinstance(histories, (list, tuple)):
            if not all(isinstance(row, dict) for row in histories):
                raise UserError(
                    f"{SOURCE}: a list of {type(histories[0]).__name__}, expected dicts with item_ids and timestamps"
                )
            names = dict.fromkeys(name for row in histories for name in row)
            table = pa.table({name: [row.get(name) for row in histories] for name in names})
        elif hasattr(histories, "__arrow_c_stream__"):
            table = pa.table(histories)
        else:
            raise UserError(
                f"{SOURCE}: {type(histories).__name__}, expected a pyarrow Table, a pandas or polars frame, or a list of dicts"
            )
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise UserError(f"{SOURCE}: {first_line(error)}") from error
    for place, field in enumerate(table.schema):
        if pa.types.is_list(field.type) and pa.types.is_null(field.type.value_type):  # only empty lists tell no type
            table = table.set_column(place, field.name, table[field.name].cast(pa.list_(pa.int64())))
    if table.num_rows == 0:
        raise UserError(f"{SOURCE}: no rows, expected one history per row")
    return table
