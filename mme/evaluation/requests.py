"""Reads the histories of requests from Parquet and checks them like training data.

A wrong history (times that decrease, milliseconds instead of seconds, a request before its last event) would still give a list,
but a worse one, so it is rejected with its row.

Legend: B histories, n their events, one history after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mme.config import USER_ID, ModelConfig
from mme.data.id_lookup import IdLookup
from mme.data.numbering import Numbering
from mme.data.parquet import READ_ERRORS
from mme.data.parts import IntArray
from mme.errors import UserError, first_line
from mme.files import open_to_read

REQUEST_COLUMN = "request_timestamp"
RequestTime = Literal["now", "last", "column"]
Unknown = Literal["skip", "refuse"]
FAR_OUTSIDE = 100  # times larger or smaller than the training data's by this factor are in another unit
UNITS = {1_000: "milliseconds", 1_000_000: "microseconds", 1_000_000_000: "nanoseconds"}


@dataclass(frozen=True)
class Requests:
    """Checked histories.

    Attributes:
        user_ids: (B,) ids as given.
        offsets: (B + 1,) int64, the events of history b are offsets[b] to offsets[b + 1].
        items: (n,) int64 item indices; −1 if the item is not in the training data.
        times: (n,) int64 seconds.
        request_times: (B,) int64 seconds, the time of the recommendation.
        of_events: column with a value per event → (n,) int64 value indices.
        of_users: column with a value per history → (B,) int64 value indices.
    """

    user_ids: pa.Array
    offsets: IntArray
    items: IntArray
    times: IntArray
    request_times: IntArray
    of_events: dict[str, IntArray]
    of_users: dict[str, IntArray]

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def of_known_items(self) -> Requests:
        """The same histories without the events of unknown items, which may make a history empty."""
        known = self.items >= 0
        before = np.concatenate([[0], np.cumsum(known)])
        return replace(
            self,
            offsets=before[self.offsets],
            items=self.items[known],
            times=self.times[known],
            of_events={name: values[known] for name, values in self.of_events.items()},
        )


def read_table(path: Path) -> pa.Table:
    """Reads the table of a Parquet file of histories.

    Raises:
        UserError: the file is missing, unreadable or empty, or two columns have the same name.
    """
    try:
        with open_to_read(path) as file, pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{path}: two columns are named {twice[0]!r}, expected one")
            table = parquet.read()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except READ_ERRORS as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows: expected one history per row")
    return table


def check_requests(
    table: pa.Table,
    source: str,
    catalogue: IdLookup,
    times_trained_on: tuple[int, int],
    request_time: RequestTime | None = None,
    unknown: Unknown = "skip",
) -> Requests:
    """Checks the histories of a table and returns them without features.

    Args:
        table: with `user_id`, `item_ids` (list of raw item ids, oldest first), `timestamps` (list of integer seconds, not
            decreasing) and optionally `request_timestamp` (integer seconds; null: the time of the last event).
        source: name of the input in messages, such as its file.
        catalogue: the items that the model knows.
        times_trained_on: first and last time of the training data.
        request_time: "last": the time of the last event; "now"; "column": that of `request_timestamp`; None: the column
            if there is one, otherwise the last event.
        unknown: whether an item that is not in the training data is an error, or gets the index −1.

    Raises:
        UserError: a file, column, row or item is missing, unknown or wrong; the line names the row, from 0.
    """
    for column in ("user_id", "item_ids", "timestamps"):
        if column not in table.column_names:
            raise UserError(f"{source}: no column {column!r} (found: {', '.join(table.column_names)})")
    raw, times = _list_column(table, source, "item_ids"), _list_column(table, source, "timestamps")
    if not pa.types.is_integer(times.type.value_type):
        raise UserError(f"{source}: column 'timestamps' contains {times.type.value_type}, expected integer seconds")
    lengths, stamps = (np.asarray(pc.list_value_length(column), np.int64) for column in (raw, times))
    wrong = np.flatnonzero((lengths == 0) | (lengths != stamps))
    if wrong.size:
        row = wrong[0]
        raise UserError(
            f"{source}: row {row}: {lengths[row] or 'no'} item_ids and {stamps[row] or 'no'} timestamps: expected at least "
            "one event and as many timestamps as items"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    seconds = _as_int64(times.flatten(), source, "timestamps")
    _require_no_fall(source, offsets, seconds)
    _require_same_unit(source, "timestamps", np.repeat(np.arange(lengths.size), lengths), seconds, times_trained_on)
    items = _find(raw.flatten(), catalogue, source, "item_ids")
    missing = np.flatnonzero(items < 0)
    if missing.size and unknown == "refuse":
        row = int(np.searchsorted(offsets, missing[0], side="right")) - 1
        raise UserError(
            f"{source}: row {row}: item {raw.flatten()[int(missing[0])].as_py()!r} is unknown: expected one of the "
            f"{catalogue.size} items of the training data (items.parquet), or --unknown skip"
        )
    requested = _request_times(table, source, seconds[offsets[1:] - 1], request_time, times_trained_on)
    return Requests(table["user_id"].combine_chunks(), offsets, items, seconds, requested, {}, {})


def with_features(
    requests: Requests, table: pa.Table, source: str, model: ModelConfig, numbering: Numbering
) -> Requests:
    """Adds the value indices of the features that the model reads to the histories; 0 stands for an unknown value.

    Raises:
        UserError: a column is missing or doesn't fit.
    """
    of_events, of_users = dict(requests.of_events), dict(requests.of_users)
    for name in model.feature_columns:
        key = "event_features" if name in model.event_features else "user_features"
        if name not in table.column_names:
            raise UserError(f"{source}: no column {name!r}, which the model reads (model.{key})")
        column = table[name].combine_chunks()
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if key == "event_features" and not is_list:
            raise UserError(
                f"{source}: column {name!r} contains {column.type}, expected a list with a value for each event"
            )
        if is_list:
            found = np.asarray(pc.list_value_length(column).fill_null(-1), np.int64)
            wrong = np.flatnonzero(found != requests.lengths)
            if wrong.size:
                raise UserError(
                    f"{source}: row {wrong[0]}: column {name!r} has {max(found[wrong[0]], 0)} values, expected "
                    f"{requests.lengths[wrong[0]]}, as many as item_ids"
                )
        values = column.flatten() if is_list else column
        try:
            if name == USER_ID:  # the row of the user; 0 for an unknown one
                numbers = _find(values, numbering.users, source, USER_ID) + 1
            else:
                numbers = numbering.vocabularies[name].find(values).astype(np.int64)
        except TypeError as error:
            raise UserError(f"{source}: column {name!r} {error}") from error
        (of_events if is_list else of_users)[name] = numbers
    return replace(requests, of_events=of_events, of_users=of_users)


def _request_times(
    table: pa.Table, source: str, last: IntArray, request_time: RequestTime | None, times_trained_on: tuple[int, int]
) -> IntArray:
    """(B,) request times, none of which is before the last event of its history, ``last`` (B,)."""
    has_column = REQUEST_COLUMN in table.column_names
    if request_time == "last" or (request_time is None and not has_column):
        return last
    if request_time == "now":
        what, requested = "--request-time now", np.full_like(last, int(time.time()))
    else:
        what = REQUEST_COLUMN
        if not has_column:
            raise UserError(f"{source}: no column {what!r}, which --request-time column needs")
        requested = _given_times(table[what].combine_chunks(), source, last)
    _require_same_unit(source, what, np.arange(last.size), requested, times_trained_on)
    early = np.flatnonzero(requested < last)
    if early.size:
        row = early[0]
        raise UserError(
            f"{source}: row {row}: {what} ({requested[row]}) is before the history's last event ({last[row]}), expected "
            "that time or a later one"
        )
    return requested


def _given_times(column: Any, source: str, last: IntArray) -> IntArray:
    """(B,) times of the column `request_timestamp`; where it is null, the time of the last event."""
    kind = column.type
    # A pandas column of integers with gaps is a column of floats.
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise UserError(
            f"{source}: column {REQUEST_COLUMN!r} contains {kind}, expected the integer second of the request, or null for "
            "the time of the last event"
        )
    return _as_int64(column, source, REQUEST_COLUMN, last)


def _require_no_fall(source: str, offsets: IntArray, times: IntArray) -> None:
    falls = np.diff(times) < 0
    falls[offsets[1:-1] - 1] = False  # from one history to the next
    found = np.flatnonzero(falls)
    if found.size:
        row = int(np.searchsorted(offsets, found[0], side="right")) - 1
        raise UserError(
            f"{source}: row {row}: timestamp {times[found[0] + 1]} follows {times[found[0]]}, expected the events oldest "
            "first"
        )


def _require_same_unit(source: str, what: str, rows: IntArray, times: IntArray, trained_on: tuple[int, int]) -> None:
    """Rejects times in another unit than the training data's, because the model would see gaps a thousand times as long."""
    first, last = trained_on
    far = np.abs(times) > FAR_OUTSIDE * max(abs(first), abs(last), 1)
    if first > 0:
        far |= times < first // FAR_OUTSIDE
    found = np.flatnonzero(far)
    if not found.size:
        return
    value = int(times[found[0]])
    unit = next((name for factor, name in UNITS.items() if first <= value // factor <= 2 * last), None)
    raise UserError(
        f"{source}: row {rows[found[0]]}: {what}: {value} is far from the times of the training data, {first} to {last} "
        f"seconds{f': it looks like {unit}' if unit else ''}; expected seconds"
    )


def _find(ids: pa.Array, known: IdLookup, source: str, column: str) -> IntArray:
    """The index of each raw id in the training data; −1 for unknown ids."""
    try:
        return known.find(ids)
    except pa.ArrowException as error:
        raise UserError(
            f"{source}: column {column!r} contains {ids.type}, expected the raw ids of the training data ({known.type})"
        ) from error


def _list_column(table: pa.Table, source: str, name: str) -> Any:
    column = table[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise UserError(f"{source}: column {name!r} contains {column.type}, expected a list in each row")
    if column.null_count or column.flatten().null_count:
        raise UserError(
            f"{source}: row {_first_null(column)}: {name} has a null, expected a value in every row and event"
        )
    return column


def _first_null(column: Any) -> int:
    has_null: Callable[[Any], bool] = lambda row: not row.is_valid or any(value is None for value in row.as_py())  # noqa: E731
    return next(number for number, row in enumerate(column) if has_null(row))


def _as_int64(column: Any, source: str, name: str, default: IntArray | None = None) -> IntArray:
    """The values of a column, with those of ``default`` where it is null."""
    try:
        values = column.cast(pa.int64())
        return np.asarray(values if default is None else pc.coalesce(values, pa.array(default)))
    except pa.ArrowInvalid as error:
        raise UserError(f"{source}: column {name!r}: {first_line(error)}") from error


def concatenate(parts: list[Requests]) -> Requests:
    """Joins the histories of all parts in order."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])

    def values(name: str) -> IntArray:
        return np.concatenate([getattr(part, name) for part in parts])

    def joined(name: str) -> dict[str, IntArray]:
        return {key: np.concatenate([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = values("items"), values("times")
    return Requests(
        pa.nulls(lengths.size), offsets, *events, values("request_times"), joined("of_events"), joined("of_users")
    )
