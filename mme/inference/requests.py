"""Requests to a trained model and its answers: histories in any of the usual formats, and lists of items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from mme.errors import UserError, first_line

SOURCE = "histories"  # the name of the input in messages


@dataclass(frozen=True)
class RecommendationRequest:
    """Histories and the settings of their lists.

    Attributes:
        histories: a table with `item_ids`, `timestamps` and optionally `user_id`, `request_timestamp` and the feature
            columns that the model reads.
        k: number of items per list.
        exclude_seen: exclude items of the history.
        candidates: raw ids of the only items to rank; None: all items.
        blocked: raw ids of items that are never recommended.
        unknown: "skip" ignores events of items that the model does not know; "refuse" is an error.
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
        item_ids: raw ids, best first; fewer than k if fewer can be ranked.
        scores: cosines in [-1, 1], or in a fallback the number of events of each item.
        fallback: whether the history has no known item, so that its list contains the most popular items.
        unknown_items: number of events left out because their item is unknown.
        model: name of the model that answered.
    """

    item_ids: list[list[Any]]
    scores: list[list[float]]
    fallback: list[bool]
    unknown_items: int
    model: str


def as_table(histories: Any) -> pa.Table:
    """Converts histories to a table.

    Args:
        histories: a pyarrow Table, a pandas or polars frame (anything that exports an Arrow stream), or a list of dicts.

    Raises:
        UserError: ``histories`` has another type or is empty, or a column mixes types.
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
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeError) as error:
        raise UserError(f"{SOURCE}: {first_line(error)}") from error
    for place, field in enumerate(table.schema):
        if pa.types.is_list(field.type) and pa.types.is_null(field.type.value_type):  # empty lists have no type
            table = table.set_column(place, field.name, table[field.name].cast(pa.list_(pa.int64())))
    if table.num_rows == 0:
        raise UserError(f"{SOURCE}: has no rows, expected one history per row")
    return table
