"""Files of interactions → a training set: cleaned, deduplicated, filtered, sorted by user and time.

DuckDB groups, joins and sorts on disk under a memory limit; what comes in and goes out passes in batches, so that the
files may be larger than memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mme.data.cleaning import Cleaner
from mme.data.formats import SourceFile, open_source
from mme.data.writer import DatasetWriter
from mme.errors import UserError

SORT_RULE = "stable by (timestamp, original row)"
EVENTS_AT_ONCE = 1 << 20
_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SMALLEST_MEMORY = 256 * 2**20


def prepare(
    inputs: Sequence[str | Path],
    format: str,
    output: str | Path,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
    min_user_events: int = 3,
    min_item_events: int = 1,
    memory_limit: str = "4GiB",
    max_malformed: float = 0.01,
) -> dict[str, Any]:
    """Writes the training set of ``inputs`` to the folder ``output``; returns what its dataset.json holds.

    Events are ordered by (timestamp, original row), files in the order given. Of rows with the same user, item and
    timestamp the first is kept. Malformed rows (no id, NaN, a negative id, a time that is no whole number, a wrong
    number of fields) are left out and counted. Then users with fewer than ``min_user_events`` and items with fewer than
    ``min_item_events`` events are dropped until all that are left have enough. Items are numbered in the order of
    their raw ids.

    Raises:
        UserError: a file is missing, empty, truncated or lacks a column; a column has a wrong type; more than the share
            ``max_malformed`` of the rows is malformed; nothing is left after the filters; the memory limit is no size
            or too small; ``output`` can't be written. Nothing is left behind then.
    """
    limit = _memory_limit(memory_limit)
    paths = [Path(path) for path in inputs]
    given = {"user": user_column, "item": item_column, "timestamp": timestamp_column}
    sources = [open_source(path, format, given) for path in paths]
    output = Path(output)
    with DatasetWriter(output) as writer:
        work = writer.partial / "work"
        work.mkdir()
        try:
            with duckdb.connect(
                str(work / "events.duckdb"), config={"temp_directory": str(work / "spill")}
            ) as database:
                database.execute(f"SET memory_limit = '{limit}B'")
                counts = _load(database, sources, max_malformed)
                counts |= _filter(database, paths, min_user_events, min_item_events)
                _write_users(database, writer)
                items: pa.Table = database.sql("SELECT item, number FROM items ORDER BY item_index").to_arrow_table()
        except duckdb.OutOfMemoryException as error:
            raise UserError(f"--memory-limit {memory_limit}: too small for this data: {_first_line(error)}") from error
        except duckdb.IOException as error:
            raise UserError(f"{output}: can't be written: {_first_line(error)}; nothing was written") from error
        for path in sorted(work.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        work.rmdir()
        info = {
            "name": output.name,
            "sort_rule": SORT_RULE,
            "source": {
                "format": format,
                "columns": [source.columns for source in sources],
                "files": [{"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths],
                "min_user_events": min_user_events,
                "min_item_events": min_item_events,
            },
            **counts,
        }
        return writer.finish(info, items["item"].combine_chunks(), items["number"].to_numpy())


def _load(database: duckdb.DuckDBPyConnection, sources: list[SourceFile], max_malformed: float) -> dict[str, Any]:
    """Fills the table `events` (user, item, timestamp, position) with the sound rows, each once."""
    cleaner = Cleaner()
    rows = sound = 0
    made = False
    for source in sources:
        for batch in source.batches():
            table = cleaner.clean(source, batch, rows)
            database.register("batch", table)
            database.execute(
                "INSERT INTO raw SELECT * FROM batch" if made else "CREATE TABLE raw AS FROM batch"
            ).fetchall()
            made = True
            database.unregister("batch")
            rows += batch.num_rows
            sound += table.num_rows
        broken = source.broken_lines
        places = [f"{source.path.name} line {line}" for line in broken[:3]]
        cleaner.malformed.add("wrong number of fields", len(broken), places)
        rows += len(broken)
        if source.rows_read + len(broken) == 0:
            raise UserError(f"{source.path}: no rows: expected one interaction a row")
    bad = cleaner.malformed
    if bad.total > max_malformed * rows or not sound:
        names = ", ".join(str(source.path) for source in sources)
        raise UserError(
            f"{names}: {bad.total:,} of {rows:,} rows are malformed, more than the share {max_malformed:g} allowed by "
            f"--max-malformed: {bad}"
        )
    database.execute(
        "CREATE TABLE events AS SELECT user, item, timestamp, min(position) AS position FROM raw "
        "GROUP BY user, item, timestamp; DROP TABLE raw"
    )
    return {
        "rows_read": rows,
        "malformed_rows": bad.total,
        "duplicate_rows": sound - _one(database, "SELECT count(*) FROM events"),
        "malformed": bad.report(),
    }


def _filter(
    database: duckdb.DuckDBPyConnection, paths: list[Path], min_user_events: int, min_item_events: int
) -> dict[str, int]:
    """Drops users and items with too few events until none is left, then numbers the items in the table `items`."""
    measure = "SELECT count(DISTINCT user), count(DISTINCT item), count(*) FROM events"
    before = database.execute(measure).fetchall()[0]
    while True:
        events = _one(database, "SELECT count(*) FROM events")
        for column, least in (("user", min_user_events), ("item", min_item_events)):
            if least > 1:
                database.execute(
                    f"CREATE OR REPLACE TABLE events AS SELECT * FROM events WHERE {column} IN "
                    f"(SELECT {column} FROM events GROUP BY {column} HAVING count(*) >= {least})"
                )
        if _one(database, "SELECT count(*) FROM events") == events:
            break
    after = database.execute(measure).fetchall()[0]
    if after[2] == 0:
        raise UserError(
            f"{', '.join(map(str, paths))}: nothing is left of {before[0]:,} users and {before[1]:,} items: none has "
            f"--min-user-events {min_user_events} and --min-item-events {min_item_events}"
        )
    database.execute(
        "CREATE TABLE items AS SELECT item, count(*) AS number, row_number() OVER (ORDER BY item) - 1 AS item_index "
        "FROM events GROUP BY item"
    )
    names = ("users_dropped", "items_dropped", "events_dropped")
    return {name: old - new for name, old, new in zip(names, before, after, strict=True)}


def _write_users(database: duckdb.DuckDBPyConnection, writer: DatasetWriter) -> None:
    reader = database.sql(
        "SELECT user, item_index, timestamp FROM events JOIN items USING (item) ORDER BY user, timestamp, position"
    ).to_arrow_reader(EVENTS_AT_ONCE)
    for table in _whole_users(reader):
        starts = _user_starts(table["user"])
        writer.add(
            table["user"].take(pa.array(starts)).combine_chunks(),
            np.append(starts, table.num_rows),
            table["item_index"].to_numpy(),
            table["timestamp"].to_numpy(),
        )


def _whole_users(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Tables that end where a user ends."""
    rest: pa.Table | None = None
    for batch in reader:
        table = pa.Table.from_batches([batch])
        if rest is not None:
            table = pa.concat_tables([rest, table]).combine_chunks()
        last = int(_user_starts(table["user"])[-1]) if table.num_rows else 0
        if last:
            yield table.slice(0, last)
        rest = table.slice(last)
    if rest is not None and rest.num_rows:
        yield rest


def _user_starts(users: pa.ChunkedArray) -> NDArray[np.int64]:
    changes = pc.not_equal(users[1:], users[:-1]).to_numpy()
    return np.append(0, np.flatnonzero(changes) + 1).astype(np.int64)


def _memory_limit(text: str) -> int:
    """Bytes of a size such as 4GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    if not match:
        raise UserError(f"--memory-limit {text}: expected a size such as 4GiB or 800MiB")
    size = int(float(match[1]) * _BYTES[match[2]])
    if size < SMALLEST_MEMORY:
        raise UserError(f"--memory-limit {text}: expected at least {SMALLEST_MEMORY >> 20}MiB")
    return size


def _one(database: duckdb.DuckDBPyConnection, query: str) -> int:
    return database.execute(query).fetchall()[0][0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
