"""The Parquet parts of a training set, read piece by piece and checked.

A prepared data set is a folder that `mme prepare` writes:

    dataset.json    name, num_users, num_items, num_events, sort_rule, parts: [{file, users, events, bytes, sha256}],
                    files: {name: {bytes, sha256}} of the others, …
    part-00000.parquet …  one row per user: user_id (raw), item_ids (list of item indices), timestamps (list of seconds,
                    not decreasing), and per feature feature_NAME (list of value indices, see `mme.data.features`)
    items.parquet   one row per item: item_index (from 0, without a gap), item_id (raw), count (events)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.data.description import require_sum
from mme.data.features import parts_column
from mme.data.layout import FEATURES_FILE, INFO_FILE, ITEMS_FILE
from mme.data.parquet import open_parquet
from mme.errors import UserError

IntArray = NDArray[np.int64]

EVENTS_AT_ONCE = 1 << 18  # events of a part that are in memory
ITEMS, TIMES = "item_ids", "timestamps"


@dataclass(frozen=True)
class PartSlice:
    """Consecutive users of a part.

    Attributes:
        lengths: (users,) int64 numbers of events.
        items: (events,) int64 item indices.
        timestamps: (events,) int64 seconds, not decreasing within a user.
        features: by column of the parts, (events,) int64 indices of its values.
    """

    lengths: IntArray
    items: IntArray
    timestamps: IntArray
    features: dict[str, IntArray]


def feature_limits(info: dict[str, Any]) -> dict[str, int]:
    """The exclusive upper limit of the indices, by feature column of the parts."""
    return {parts_column(name): number + 1 for name, number in info.get("features", {}).items()}


def limits(info: dict[str, Any]) -> dict[str, int]:
    """The exclusive upper limits of `feature_limits` and of the item indices."""
    return {ITEMS: info["num_items"], **feature_limits(info)}


def read_part(folder: Path, part: dict[str, Any], limits: dict[str, int]) -> Iterator[PartSlice]:
    """Yields the users of one part in order, about `EVENTS_AT_ONCE` events at a time.

    The checksum is verified first, which also brings the file into the page cache.

    Args:
        limits: see the function `limits`.

    Raises:
        UserError: the file is missing, damaged or does not match ``part``, an index is out of range, a timestamp decreases
            or a value is null; the message names the file and the row, from 0.
    """
    path = folder / part["file"]
    require_sum(folder, part["file"], part)
    row = events = 0
    for batch in _batches(folder, part, list(dict.fromkeys([ITEMS, TIMES, *limits]))):
        piece = _check(path, row, batch, limits)
        row, events = row + piece.lengths.size, events + piece.items.size
        if events > part["events"]:
            raise UserError(f"{path}: has more events than {INFO_FILE} says ({part['events']})")
        yield piece
    if events < part["events"]:
        raise UserError(f"{path}: has {events} events, {INFO_FILE} says {part['events']}")


def read_user_ids(folder: Path, part: dict[str, Any]) -> Iterator[pa.Array]:
    """Yields the raw ids of one part's users in order, in pieces."""
    with open_parquet(folder, part["file"]) as file:
        for batch in file.iter_batches(EVENTS_AT_ONCE, columns=["user_id"], use_threads=False):
            yield batch.column(0)


def check_files(folder: Path, info: dict[str, Any]) -> None:
    """Compares dataset.json with the files before memory is allocated for the declared sizes.

    It reads the footers of the parts, and also verifies the checksums of items.parquet and features.parquet, which are
    small. `read_part` verifies those of the parts.

    Raises:
        UserError: a file is missing or damaged, or its number of rows or values does not match dataset.json.
    """
    rows = {ITEMS_FILE: info["num_items"]}
    if info.get("features"):
        rows[FEATURES_FILE] = sum(info["features"].values())
    for name, declared in rows.items():
        require_sum(folder, name, info.get("files", {}).get(name))
        with open_parquet(folder, name) as file:
            if file.metadata.num_rows != declared:
                raise UserError(f"{folder / name}: has {file.metadata.num_rows} rows, {INFO_FILE} says {declared}")
    for part in info["parts"]:
        with open_parquet(folder, part["file"]) as file:
            _check_footer(folder / part["file"], file.metadata, part)


def _check_footer(path: Path, metadata: pq.FileMetaData, part: dict[str, Any]) -> None:
    if metadata.num_rows != part["users"]:
        raise UserError(f"{path}: has {metadata.num_rows} rows, {INFO_FILE} says {part['users']}")
    # A few bytes of Parquet can decompress to any number of values. An empty list counts as one value.
    most = part["events"] + part["users"]
    for column in range(metadata.num_columns):
        groups = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
        if sum(group.num_values for group in groups) > most:
            name = groups[0].path_in_schema.partition(".")[0]
            raise UserError(f"{path}: {name} has more events than {INFO_FILE} says ({part['events']})")


def _batches(folder: Path, part: dict[str, Any], columns: list[str]) -> Iterator[pa.RecordBatch]:
    path = folder / part["file"]
    with open_parquet(folder, part["file"]) as file:
        for name in columns:
            if name not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {name!r} (found: {', '.join(file.schema_arrow.names)})")
            kind = file.schema_arrow.field(name).type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
                raise UserError(f"{path}: column {name!r} holds {kind}, expected list<int64>")
        rows = max(1, EVENTS_AT_ONCE * part["users"] // max(part["events"], 1))
        yield from file.iter_batches(rows, columns=columns, use_threads=False)


def _check(path: Path, first_row: int, batch: pa.RecordBatch, limits: dict[str, int]) -> PartSlice:
    names = batch.schema.names
    for name in names:
        if batch.column(name).null_count:
            row = first_row + pc.index(pc.is_null(batch.column(name)), True).as_py()
            raise UserError(f"{path}: row {row}: {name} is null, expected a list")
    lengths, *others = (np.asarray(pc.list_value_length(batch.column(name)), dtype=np.int64) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        unequal = np.flatnonzero(lengths != other)
        if unequal.size:
            raise UserError(f"{path}: row {first_row + unequal[0]}: {name} and item_ids have different lengths")
    row_of_event = np.repeat(np.arange(first_row, first_row + lengths.size), lengths)
    arrays: dict[str, IntArray] = {}
    for name in names:
        values = batch.column(name).flatten()
        if values.null_count:
            row = row_of_event[pc.index(pc.is_null(values), True).as_py()]
            raise UserError(f"{path}: row {row}: {name} has a null, expected an integer for every event")
        arrays[name] = np.asarray(values).astype(np.int64, copy=False)
    for name, limit in limits.items():
        wrong = np.flatnonzero((arrays[name] < 0) | (arrays[name] >= limit))
        if wrong.size:
            row, value = row_of_event[wrong[0]], arrays[name][wrong[0]]
            what = "item index" if name == ITEMS else f"{name} index"
            raise UserError(f"{path}: row {row}: {what} {value}, expected 0 to {limit - 1}")
    items, times = arrays.pop(ITEMS), arrays.pop(TIMES)
    falls = np.flatnonzero((np.diff(times) < 0) & (np.diff(row_of_event) == 0))
    if falls.size:
        before, after = times[falls[0]], times[falls[0] + 1]
        raise UserError(
            f"{path}: row {row_of_event[falls[0]]}: timestamp {after} follows {before}, expected no decrease"
        )
    return PartSlice(lengths, items, times, arrays)
