"""Turns files of interactions into a training set: cleaned, deduplicated, filtered, sorted by user and time.

    files → batches, cleaned (`formats`, `readers`, `cleaning`) → events on disk, sorted by DuckDB (`event_store`)
          → whole users, duplicates dropped, in a file (`histories`) → rounds of the count filters
          → with what a prior set has (`merging`) → Parquet (`writer`)

Only batches, about twenty bytes per item, and the longest history are in memory. Everything else is on disk next to the output,
where an interrupted run leaves the events that it has read for the next run (`unfinished`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from mme.config import USER_ID
from mme.data.features import KINDS, parts_column, write_vocabularies
from mme.data.remote_set import set_to_write
from mme.errors import UserError, first_line, print_line
from mme.paths import local_path, remote_url
from mme.prepare.cleaning import ID_ROLES, Cleaner
from mme.prepare.description import describe_sources
from mme.prepare.event_store import EventStore, was_interrupted
from mme.prepare.feedback import FeedbackFilter
from mme.prepare.formats import ReadOptions, identify, open_source, same_format
from mme.prepare.histories import NEW, BoolArray, CountFilter, Histories, IntArray, Spool, first_of_duplicates
from mme.prepare.ids import ID_TYPES, IdColumn
from mme.prepare.inputs import find_files
from mme.prepare.item_table import ItemOptions, ItemTable, earlier_columns
from mme.prepare.left_out import LeftOutWriter
from mme.prepare.manifest import Settings, describe, file_record
from mme.prepare.merging import write_histories
from mme.prepare.prior import PriorSet
from mme.prepare.quoting import QUOTING, Quoting
from mme.prepare.reading import Reading
from mme.prepare.times import TIME_UNITS
from mme.prepare.unfinished import READ_FILE, WORK_FOLDER, WorkFolder
from mme.prepare.writer import DatasetWriter

_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SMALLEST_MEMORY = 512 * 2**20
# Memory besides DuckDB's: interpreter and libraries, batches in flight, the row group that is being written.
OTHER_MEMORY = 384 * 2**20
KEPT = Path(WORK_FOLDER, READ_FILE)  # left by an interrupted run
DUCKDB_SHARE = 0.9  # share of the rest, because DuckDB uses somewhat more than its limit


def prepare(
    inputs: Sequence[str | Path],
    format: str,
    output: str | Path,
    *,
    columns: dict[str, str | None] | None = None,
    header: bool | None = None,
    quoting: Quoting = "auto",
    time_unit: str = "auto",
    id_type: str = "auto",
    min_rating: float | None = None,
    clicks_only: bool | None = None,
    min_watch_time: float | None = None,
    min_watch_ratio: float | None = None,
    min_user_events: int = 3,
    min_item_events: int = 1,
    filter_once: bool = False,
    feature_columns: Sequence[str] = (),
    items: ItemOptions | None = None,
    memory_limit: str = "4GiB",
    max_malformed_share: float = 0.01,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Writes the training set of ``inputs`` to the folder ``output`` and returns the content of its dataset.json.

    ``inputs`` are files, folders and patterns (`find_files`). ``columns`` names the column of a role (user, item,
    timestamp, rating, click, watch_time, watch_ratio); `ReadOptions` describes this and the other options of reading.
    Events are rows with the required feedback (`FeedbackFilter`; ``min_watch_time`` is in seconds; ``clicks_only`` None means True
    for KuaiRand, whose log has everything that was shown, and False otherwise). ``tell`` is called before anything is read, with a
    text that describes the recognised form of each file.

    Events are ordered by time at its full resolution, then by file, in the given order, and row; the set stores seconds. The first of
    several rows with the same user, item and time is kept. Malformed rows (a missing or invalid id or time, a wrong number of
    fields) are left out and counted. Then users with fewer than ``min_user_events`` and items with fewer than ``min_item_events``
    events are dropped, repeatedly until all remaining ones have enough or, with ``filter_once``, by one count of all events. Items
    are numbered in the order of their raw ids. ``feature_columns`` names columns to keep besides item and time, such as ``action``
    or ``price:number`` (`mme.data.features`). ``items`` is a file with titles and attributes of items (`ItemTable`).

    Raises:
        UserError: a file is missing, empty, truncated, not a regular file or lacks a column; its content can be read in two
            ways; a column has a wrong type; a larger share of the rows than ``max_malformed_share`` is malformed; nothing
            is left after the filters; the memory limit is invalid or too small; ``output`` can't be written. Then nothing is
            left behind.
    """
    settings = Settings(
        ReadOptions(format, _given(columns), header, quoting, time_unit, id_type),
        FeedbackFilter(min_rating, clicks_only, min_watch_time, min_watch_ratio),
        CountFilter(min_user_events, min_item_events, iterate=not filter_once),
        list(dict.fromkeys(feature_columns)),
    )
    if USER_ID in settings.feature_kinds:
        raise UserError(f"--feature-columns {USER_ID}: every set has it (model.user_features: [{USER_ID}])")
    limit = _memory_limit(memory_limit)
    _check_target(output, "--output")
    settings, reading = _open(inputs, settings, None, max_malformed_share, tell)
    item_table = ItemTable.read(items, reading.cleaner.ids["item"]) if items else None
    with set_to_write(output) as folder, DatasetWriter(folder, kept=KEPT) as writer:
        return _make(writer, reading, settings, None, limit, item_table)


def add_events(
    inputs: Sequence[str | Path],
    prepared: str | Path,
    *,
    format: str | None = None,
    columns: dict[str, str | None] | None = None,
    header: bool | None = None,
    quoting: Quoting | None = None,
    time_unit: str | None = None,
    id_type: str | None = None,
    items: ItemOptions | None = None,
    memory_limit: str = "4GiB",
    max_malformed_share: float = 0.01,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Adds the events of ``inputs`` to the training set in the folder ``prepared`` and returns the new content of dataset.json.

    They are read and filtered like the set, except for the reading options that are given. Users keep their rows and
    items their indices; new ones are appended in the order of their raw ids. Apart from this, the set equals one made of all files
    together. Events that the set already has are dropped, so adding a file twice changes nothing.

    Raises:
        UserError: see `prepare`; or ``prepared`` was not made from files of interactions, or has ids of another type.
    """
    limit = _memory_limit(memory_limit)
    _check_target(prepared, "--add-to")
    with set_to_write(prepared, extend=True) as folder, DatasetWriter(folder, kept=KEPT) as writer:
        prior = PriorSet(folder)
        before = prior.settings.read
        read = ReadOptions(
            format or before.format,
            {**before.columns, **_given(columns)},
            before.header if header is None else header,
            quoting or before.quoting,
            time_unit or before.time_unit,
            id_type or before.id_type,
        )
        settings, reading = _open(inputs, replace(prior.settings, read=read), prior, max_malformed_share, tell)
        item_table = ItemTable.read(items, reading.cleaner.ids["item"]) if items else None
        return _make(writer, reading, settings, prior, limit, item_table)


def _check_target(path: str | Path, option: str) -> None:
    if remote_url(path) is None:
        local_path(path, option)


def _given(columns: dict[str, str | None] | None) -> dict[str, str]:
    return {role: name for role, name in (columns or {}).items() if name is not None}


def _open(
    inputs: Sequence[str | Path],
    settings: Settings,
    prior: PriorSet | None,
    max_malformed_share: float,
    tell: Callable[[str], None] | None,
) -> tuple[Settings, Reading]:
    """Opens the files and completes the settings by what their formats determine."""
    read = settings.read
    for option, value, known in (
        ("time-unit", read.time_unit, TIME_UNITS),
        ("id-type", read.id_type, ID_TYPES),
        ("quoting", read.quoting, QUOTING),
    ):
        if value not in known:
            raise UserError(f"--{option} {value}: expected one of {', '.join(known)}")
    paths = find_files(inputs, same_format(read.format))
    formats = [identify(path, read.format) for path in paths]
    if settings.feedback.clicks_only is None:
        settings = replace(settings, feedback=replace(settings.feedback, clicks_only="kuairand" in formats))
    roles = [*settings.feedback.roles(), *map(parts_column, settings.feature_kinds)]
    sources = [open_source(path, read, format, roles) for path, format in zip(paths, formats, strict=True)]
    vocabularies = (
        prior.vocabularies if prior else {name: KINDS[kind]() for name, kind in settings.feature_kinds.items()}
    )
    ids = prior.ids if prior else {role: IdColumn() for role in ID_ROLES}
    for column in ids.values():
        column.said = read.id_type
        if read.id_type == "integer" and column.kind is None:
            column.kind = "integer"
    reading = Reading(sources, Cleaner(settings.feedback, ids, vocabularies, read.time_unit), max_malformed_share)
    reading.examine()
    if tell is not None:
        tell(describe_sources(sources, reading.cleaner.ids))
    return settings, reading


def _make(
    writer: DatasetWriter,
    reading: Reading,
    settings: Settings,
    prior: PriorSet | None,
    memory_limit: int,
    item_table: ItemTable | None,
) -> dict[str, Any]:
    """Writes the set and puts it in place."""
    sources, vocabularies = reading.sources, reading.cleaner.vocabularies
    inputs = [source.path for source in sources]
    work = WorkFolder(writer.partial, inputs, settings, prior.folder if prior else None)
    spool = Spool(work.path / "histories.arrow")
    chosen = _choose(reading, settings.counts, prior, work, spool, memory_limit, writer.output)
    with LeftOutWriter(writer.partial, chosen.raw_items) as left_out:
        item_index = np.cumsum(chosen.in_set) - 1
        known = write_histories(
            spool, settings.counts, chosen.passes, item_index, prior, writer, left_out, chosen.has_fractions
        )
    work.remove()
    write_vocabularies(writer.partial, vocabularies)
    np.subtract.at(chosen.counts, known, 1)
    run = {
        "format": settings.read.format,
        "columns": [source.columns for source in sources],
        "times": [str(source.time_form) for source in sources],
        "files": [file_record(source.path) for source in sources],
        **reading.report(),
        "duplicate_rows": chosen.duplicates + known.size,
    }
    id_types = {role: str(ids.arrow_type) for role, ids in reading.cleaner.ids.items()}
    info = {
        **describe(writer.output.name, settings, id_types, run, prior.info if prior else None),
        "users_dropped": left_out.users,
        "items_dropped": len(chosen.raw_items) - int(chosen.in_set.sum()),
        "events_dropped": left_out.events,
        "has_fractions": chosen.has_fractions,
        "features": {name: len(vocabulary.numbers) for name, vocabulary in vocabularies.items()},
    }
    raw_items, counts = chosen.raw_items.filter(pa.array(chosen.in_set)), chosen.counts[chosen.in_set]
    item_columns = earlier_columns(prior.item_columns if prior else {}, len(raw_items))
    if item_table is not None:
        item_columns, run["items"] = item_table.join(raw_items, item_columns)
    return writer.finish(info, raw_items, counts, item_columns)


@dataclass
class _Chosen:
    """The items by code, and which of them are in the set.

    Attributes:
        raw_items: (items,) raw ids.
        passes: (items,) bool, whether the filter keeps an item.
        counts: (items,) int64, kept events of each item, including those of the prior set.
        duplicates: events dropped as duplicates.
        has_fractions: whether the histories have `FRACTIONS`.
    """

    raw_items: pa.Array
    passes: BoolArray
    counts: IntArray
    duplicates: int
    has_fractions: bool

    @property
    def in_set(self) -> BoolArray:
        return self.counts > 0


def _choose(
    reading: Reading,
    count_filter: CountFilter,
    prior: PriorSet | None,
    work: WorkFolder,
    spool: Spool,
    memory_limit: int,
    output: Path,
) -> _Chosen:
    """Reads, sorts and spools all events, including those that the prior set left out, and filters the items."""
    num_prior = len(prior.raw_items) if prior else 0
    try:
        with EventStore(work.path, int((memory_limit - OTHER_MEMORY) * DUCKDB_SHARE)) as store:
            if work.found is None or not store.has_events():
                store.load(_with_left_out(reading.tables(), prior))
                work.keep(reading.state())
            else:
                reading.restore(work.found)
                print_line(
                    f"{output}: resumes with the {reading.rows:,} rows that an interrupted run had read", sys.stdout
                )
            reading.check()
            if prior is not None:
                store.load_prior(prior.user_rows(), prior.raw_items, prior.has_fractions)
            ids = reading.cleaner.ids
            raw_items = store.number_items(ids["item"].unsigned)
            distinct = _Distinct(store.histories(ids["user"].unsigned))
            passes, counts = count_filter.choose_items(spool, iter(distinct), len(raw_items), num_prior)
            has_fractions = store.has_fractions
    except duckdb.OutOfMemoryException as error:
        size = f"{memory_limit >> 20}MiB"
        raise UserError(f"--memory-limit {size}: too small for this data: {first_line(error)}") from error
    except duckdb.IOException as error:
        raise UserError(f"{output}: can't be written: {first_line(error)}; nothing was written") from error
    except (duckdb.Error, RuntimeError) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        raise
    if prior is not None:
        counts[:num_prior] += prior.counts
    if not counts.any():
        raise UserError(
            f"{reading.names()}: nothing is left of {distinct.users:,} users and {len(raw_items):,} items: none has "
            f"--min-user-events {count_filter.min_user_events} and --min-item-events {count_filter.min_item_events}"
        )
    return _Chosen(raw_items, passes, counts, distinct.dropped, has_fractions)


def _with_left_out(tables: Iterator[pa.Table], prior: PriorSet | None) -> Iterator[pa.Table]:
    """The events that the prior set left out, then the new ones."""
    if prior is None:
        yield from tables
        return
    yield from prior.left_out()
    for table in tables:
        yield table.append_column("place", pa.array(np.full(table.num_rows, NEW, np.int32)))


@dataclass
class _Distinct:
    """Iterates over histories without duplicate events, and counts users and duplicates."""

    arriving: Iterator[Histories]
    users: int = 0
    dropped: int = 0

    def __iter__(self) -> Iterator[Histories]:
        for histories in self.arriving:
            first = first_of_duplicates(histories)
            self.users += histories.rows.size
            self.dropped += int(first.size - first.sum())
            yield histories if first.all() else histories.select(first)


def _memory_limit(text: str) -> int:
    """The number of bytes of a size such as 4GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    if not match:
        raise UserError(f"--memory-limit {text}: expected a size such as 4GiB or 800MiB")
    size = int(float(match[1]) * _BYTES[match[2]])
    if size < SMALLEST_MEMORY:
        raise UserError(f"--memory-limit {text}: expected at least {SMALLEST_MEMORY >> 20}MiB")
    return size
