"""Files of interactions → a training set: cleaned, deduplicated, filtered, sorted by user and time.

    files → batches, cleaned (`formats`, `readers`, `cleaning`) → events on disk, sorted by DuckDB (`event_store`)
          → whole users, duplicates dropped, in a file (`histories`) → rounds of the count filters
          → with what a prior set has (`merging`) → Parquet (`writer`)

Memory holds batches, some twenty bytes an item and the longest history; all else is on disk beside the output, where an
interrupted run leaves the events that it had read to the next (`unfinished`).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from mme.config import USER_ID
from mme.data.features import Vocabulary, parts_column, write_vocabularies
from mme.errors import UserError, first_line
from mme.prepare.cleaning import Cleaner, Malformed
from mme.prepare.event_store import EventStore
from mme.prepare.feedback import FeedbackFilter
from mme.prepare.formats import find_files, identify, open_source
from mme.prepare.histories import NEW, BoolArray, CountFilter, Histories, IntArray, Spool, first_of_duplicates
from mme.prepare.left_out import LeftOutWriter
from mme.prepare.manifest import Settings, describe, file_record
from mme.prepare.merging import write_histories
from mme.prepare.prior import ID_TYPES, PriorSet
from mme.prepare.readers import SourceFile
from mme.prepare.unfinished import READ_FILE, WORK_FOLDER, WorkFolder
from mme.prepare.writer import DatasetWriter

_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SMALLEST_MEMORY = 512 * 2**20
# What the process takes besides DuckDB: interpreter and libraries, batches on their way, the row group being written.
OTHER_MEMORY = 384 * 2**20
KEPT = Path(WORK_FOLDER, READ_FILE)  # of an interrupted run
DUCKDB_SHARE = 0.9  # of the rest: DuckDB takes some more than the limit it is given


def prepare(
    inputs: Sequence[str | Path],
    format: str,
    output: str | Path,
    *,
    columns: dict[str, str | None] | None = None,
    min_rating: float | None = None,
    clicks_only: bool | None = None,
    min_watch_time: float | None = None,
    min_watch_ratio: float | None = None,
    min_user_events: int = 3,
    min_item_events: int = 1,
    filter_once: bool = False,
    feature_columns: Sequence[str] = (),
    memory_limit: str = "4GiB",
    max_malformed_share: float = 0.01,
) -> dict[str, Any]:
    """Writes the training set of ``inputs`` to the folder ``output``; returns what its dataset.json holds.

    ``inputs`` are files, folders and patterns (`find_files`). ``columns`` names the column of a role (user, item,
    timestamp, rating, click, watch_time, watch_ratio). Events are those with the feedback asked for (`FeedbackFilter`;
    ``min_watch_time`` in seconds; ``clicks_only`` None: for KuaiRand yes, whose log has all that was shown, else no).

    Events are ordered by (timestamp, original row), files in the order given. Of rows with the same user, item and
    timestamp the first is kept. Malformed rows (no id, NaN, a negative id, a time that is no whole number, a wrong
    number of fields) are left out and counted. Then users with fewer than ``min_user_events`` and items with fewer than
    ``min_item_events`` events are dropped, until all that are left have enough or, with ``filter_once``, by one count of
    all events. Items are numbered in the order of their raw ids. ``feature_columns`` names columns of categories that are
    kept beside item and time (`mme.data.features`).

    Raises:
        UserError: a file is missing, empty, truncated or lacks a column; a column has a wrong type; more than the share
            ``max_malformed_share`` of the rows is malformed; nothing is left after the filters; the memory limit is no
            size or too small; ``output`` can't be written. Nothing is left behind then.
    """
    settings = Settings(
        format,
        {role: name for role, name in (columns or {}).items() if name is not None},
        FeedbackFilter(min_rating, clicks_only, min_watch_time, min_watch_ratio),
        CountFilter(min_user_events, min_item_events, iterate=not filter_once),
        list(dict.fromkeys(feature_columns)),
    )
    if USER_ID in settings.features:
        raise UserError(f"--feature-columns {USER_ID}: every set has it (model.user_features: [{USER_ID}])")
    limit = _memory_limit(memory_limit)
    settings, sources = _open(inputs, settings)
    with DatasetWriter(Path(output), kept=KEPT) as writer:
        return _make(writer, sources, settings, None, limit, max_malformed_share)


def add_events(
    inputs: Sequence[str | Path],
    prepared: str | Path,
    *,
    format: str | None = None,
    columns: dict[str, str | None] | None = None,
    memory_limit: str = "4GiB",
    max_malformed_share: float = 0.01,
) -> dict[str, Any]:
    """Adds the events of ``inputs`` to the training set in the folder ``prepared``; returns what dataset.json holds.

    They are read and filtered as the set was, ``format`` and names of columns apart where given. Users keep their rows
    and items their indices, new ones come behind in the order of their raw ids; else the set is the same as one made of
    all files at once. An event that the set has already is dropped, so that adding a file twice changes nothing.

    Raises:
        UserError: as `prepare`, or ``prepared`` is no set made of files of interactions.
    """
    limit = _memory_limit(memory_limit)
    with DatasetWriter(Path(prepared), kept=KEPT) as writer:
        prior = PriorSet(Path(prepared))
        given = {role: name for role, name in (columns or {}).items() if name is not None}
        settings = replace(
            prior.settings, format=format or prior.settings.format, columns={**prior.settings.columns, **given}
        )
        settings, sources = _open(inputs, settings)
        return _make(writer, sources, settings, prior, limit, max_malformed_share)


def _open(inputs: Sequence[str | Path], settings: Settings) -> tuple[Settings, list[SourceFile]]:
    """The files, and the settings with what their formats decide."""
    paths = find_files(inputs, settings.format)
    formats = [identify(path, settings.format) for path in paths]
    if settings.feedback.clicks_only is None:
        settings = replace(settings, feedback=replace(settings.feedback, clicks_only="kuairand" in formats))
    roles = [*settings.feedback.roles(), *map(parts_column, settings.features)]
    return settings, [
        open_source(path, format, settings.columns, roles) for path, format in zip(paths, formats, strict=True)
    ]


def _make(
    writer: DatasetWriter,
    sources: list[SourceFile],
    settings: Settings,
    prior: PriorSet | None,
    memory_limit: int,
    max_malformed_share: float,
) -> dict[str, Any]:
    """Writes and commits the set."""
    vocabularies = prior.vocabularies if prior else {name: Vocabulary() for name in settings.features}
    cleaner = Cleaner(settings.feedback, prior.id_types if prior else None, vocabularies)
    reading = _Reading(sources, cleaner, max_malformed_share)
    inputs = [source.path for source in sources]
    work = WorkFolder(writer.partial, inputs, settings, prior.folder if prior else None)
    spool = Spool(work.path / "histories.arrow")
    chosen = _choose(reading, settings.counts, prior, work, spool, memory_limit, writer.output)
    with LeftOutWriter(writer.partial, chosen.raw_items) as left_out:
        item_index = np.cumsum(chosen.in_set) - 1
        known = write_histories(spool, settings.counts, chosen.passes, item_index, prior, writer, left_out)
    work.remove()
    write_vocabularies(writer.partial, vocabularies)
    np.subtract.at(chosen.counts, known, 1)
    run = {
        "format": settings.format,
        "columns": [source.columns for source in sources],
        "files": [file_record(source.path) for source in sources],
        **reading.report(),
        "duplicate_rows": chosen.duplicates + known.size,
    }
    id_types = {role: str(kind) for role, kind in reading.cleaner.id_types.items()}
    info = {
        **describe(writer.output.name, settings, id_types, run, prior.info if prior else None),
        "users_dropped": left_out.users,
        "items_dropped": len(chosen.raw_items) - int(chosen.in_set.sum()),
        "events_dropped": left_out.events,
        "features": {name: len(vocabulary.numbers) for name, vocabulary in vocabularies.items()},
    }
    return writer.finish(info, chosen.raw_items.filter(pa.array(chosen.in_set)), chosen.counts[chosen.in_set])


@dataclass
class _Chosen:
    """Items by code, and which of them the set has.

    Attributes:
        raw_items: (items,) raw ids.
        passes: (items,) bool, whether the filter keeps an item.
        counts: (items,) int64, events kept of each, those of the prior set too.
        duplicates: events dropped because they are there twice.
    """

    raw_items: pa.Array
    passes: BoolArray
    counts: IntArray
    duplicates: int

    @property
    def in_set(self) -> BoolArray:
        return self.counts > 0


def _choose(
    reading: _Reading,
    count_filter: CountFilter,
    prior: PriorSet | None,
    work: WorkFolder,
    spool: Spool,
    memory_limit: int,
    output: Path,
) -> _Chosen:
    """Reads, sorts and spools all events, those that the prior set left out too, and filters the items."""
    num_prior = len(prior.raw_items) if prior else 0
    try:
        with EventStore(work.path, int((memory_limit - OTHER_MEMORY) * DUCKDB_SHARE)) as store:
            if work.found is None or not store.has_events():
                store.load(_with_left_out(reading.tables(), prior))
                work.keep(reading.state())
            else:
                reading.restore(work.found)
                print(
                    f"{output}: goes on with the {reading.rows:,} rows that an interrupted run had read",
                    file=sys.stderr,
                )
            reading.check()
            if prior is not None:
                store.load_prior(prior.user_rows(), prior.raw_items)
            raw_items = store.number_items()
            distinct = _Distinct(store.histories())
            passes, counts = count_filter.choose_items(spool, iter(distinct), len(raw_items), num_prior)
    except duckdb.OutOfMemoryException as error:
        size = f"{memory_limit >> 20}MiB"
        raise UserError(f"--memory-limit {size}: too small for this data: {first_line(error)}") from error
    except duckdb.IOException as error:
        raise UserError(f"{output}: can't be written: {first_line(error)}; nothing was written") from error
    if prior is not None:
        counts[:num_prior] += prior.counts
    if not counts.any():
        raise UserError(
            f"{reading.names()}: nothing is left of {distinct.users:,} users and {len(raw_items):,} items: none has "
            f"--min-user-events {count_filter.min_user_events} and --min-item-events {count_filter.min_item_events}"
        )
    return _Chosen(raw_items, passes, counts, distinct.dropped)


def _with_left_out(tables: Iterator[pa.Table], prior: PriorSet | None) -> Iterator[pa.Table]:
    """New events with those that the prior set left out."""
    if prior is None:
        yield from tables
        return
    yield from prior.left_out()
    for table in tables:
        yield table.append_column("place", pa.array(np.full(table.num_rows, NEW, np.int32)))


@dataclass
class _Reading:
    """Reads and cleans the files, one after another."""

    sources: list[SourceFile]
    cleaner: Cleaner
    max_malformed_share: float
    rows: int = 0
    sound: int = 0

    def tables(self) -> Iterator[pa.Table]:
        for source in self.sources:
            for batch in source.batches():
                table = self.cleaner.clean(source, batch, self.rows)
                self.rows += batch.num_rows
                self.sound += table.num_rows
                if batch.num_rows:
                    yield table
            broken = source.broken_lines
            places = [f"{source.path.name} line {line}" for line in broken[:3]]
            self.cleaner.malformed.add("wrong number of fields", len(broken), places)
            self.rows += len(broken)
            if source.rows_read + len(broken) == 0:
                raise UserError(f"{source.path}: no rows: expected one interaction a row")

    def state(self) -> dict[str, Any]:
        """What has been found when all is read, for `restore`."""
        cleaner = self.cleaner
        return {
            "rows": self.rows,
            "sound": self.sound,
            "malformed": {"counts": cleaner.malformed.counts, "examples": cleaner.malformed.examples},
            "unwanted": cleaner.unwanted,
            "id_types": {role: str(kind) for role, kind in cleaner.id_types.items()},
            "vocabularies": {name: list(vocabulary.numbers) for name, vocabulary in cleaner.vocabularies.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """As if all had been read here."""
        cleaner = self.cleaner
        self.rows, self.sound = state["rows"], state["sound"]
        cleaner.malformed = Malformed(Counter(state["malformed"]["counts"]), state["malformed"]["examples"])
        cleaner.unwanted = Counter(state["unwanted"])
        cleaner.id_types = {role: ID_TYPES[name] for role, name in state["id_types"].items()}
        for name, values in state["vocabularies"].items():
            cleaner.vocabularies[name].numbers = Vocabulary(values).numbers

    def check(self) -> None:
        """Refuses files of which too much is malformed."""
        bad = self.cleaner.malformed
        if not self.sound and self.cleaner.unwanted:
            reasons = "; ".join(f"{reason}: {number:,}" for reason, number in self.cleaner.unwanted.items())
            raise UserError(f"{self.names()}: no row of {self.rows:,} has the feedback asked for ({reasons})")
        if bad.total > self.max_malformed_share * self.rows or not self.sound:
            raise UserError(
                f"{self.names()}: {bad.total:,} of {self.rows:,} rows are malformed, more than the share "
                f"{self.max_malformed_share:g} allowed by --max-malformed-share: {bad}"
            )

    def names(self) -> str:
        """The files; of many the first few."""
        paths = [str(source.path) for source in self.sources]
        return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more files" if len(paths) > 3 else "")

    def report(self) -> dict[str, Any]:
        bad = self.cleaner.malformed
        return {
            "rows_read": self.rows,
            "malformed_rows": bad.total,
            "malformed": bad.report(),
            "unwanted_rows": sum(self.cleaner.unwanted.values()),
            "unwanted": dict(self.cleaner.unwanted),
        }


@dataclass
class _Distinct:
    """Histories without their duplicate events, and how many users and duplicates there were."""

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
    """Bytes of a size such as 4GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    if not match:
        raise UserError(f"--memory-limit {text}: expected a size such as 4GiB or 800MiB")
    size = int(float(match[1]) * _BYTES[match[2]])
    if size < SMALLEST_MEMORY:
        raise UserError(f"--memory-limit {text}: expected at least {SMALLEST_MEMORY >> 20}MiB")
    return size
