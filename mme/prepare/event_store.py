"""Keeps events on disk and sorts and groups them with DuckDB under a memory limit.

Numeric ids arrive as int64, unsigned ones wrapped (`mme.prepare.ids`); `number_items` and `histories` unwrap them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mme.data.layout import FEATURE_PREFIX, FRACTIONS
from mme.prepare.histories import NEW, Histories, IntArray
from mme.prepare.ids import as_bits, from_bits

EVENTS_AT_ONCE = 1 << 18
# Flips the sign bit, which puts wrapped unsigned numbers in order; flipping again restores them.
FLIPPED = "xor({}, (-9223372036854775808)::BIGINT)"


class EventStore:
    """A table of events (user, item, timestamp, fraction, position, features, place) in ``folder``; see `Histories` for place.

    DuckDB uses at most ``memory_limit`` bytes and spills to the folder.

    Attributes:
        has_fractions: whether any event has a fraction; known once the events are loaded.
    """

    def __init__(self, folder: Path, memory_limit: int) -> None:
        self._database = duckdb.connect(str(folder / "events.duckdb"), config={"temp_directory": str(folder / "spill")})
        self._database.execute(f"SET memory_limit = '{memory_limit}B'")
        # The position is a column, so the order of insertion need not be kept in memory.
        self._database.execute("SET preserve_insertion_order = false; SET enable_progress_bar = false")
        self._has_prior = self.has_fractions = False

    def __enter__(self) -> EventStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def load(self, tables: Iterator[pa.Table], table: str = "events") -> None:
        """Fills a table of the store and replaces an older one; all ``tables`` have the same columns.

        The columns of `events` are user, item, timestamp, fraction, position, features and, if there is a prior set,
        place. An exception of ``tables`` is raised unchanged.
        """
        failure: list[BaseException] = []
        first = next(tables, None)
        if first is None:
            return

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from first.to_batches()
                for more in tables:
                    yield from more.to_batches()
            except BaseException as error:
                failure.append(error)
                raise

        self._database.register("stream", pa.RecordBatchReader.from_batches(first.schema, batches()))
        try:
            self._database.execute(f"CREATE OR REPLACE TABLE {table} AS FROM stream").fetchall()
        except Exception as error:
            raise (failure or [error])[0] from None
        finally:
            self._database.unregister("stream")

    def has_events(self) -> bool:
        """Whether an earlier process has loaded the events."""
        return bool(self._database.execute("FROM duckdb_tables() WHERE table_name = 'events'").fetchall())

    def load_prior(self, user_rows: Iterator[pa.Table], raw_items: pa.Array, has_fractions: bool) -> None:
        """Loads a prior set: tables of user and row, and its items in the order of their codes."""
        self._has_prior, self.has_fractions = True, has_fractions
        self.load(user_rows, "prior_users")
        self.load(iter([pa.table({"item": as_bits(raw_items), "code": np.arange(len(raw_items))})]), "prior_items")

    def number_items(self, unsigned: bool) -> pa.Array:
        """Gives each item its code, in the order of the raw ids; returns the raw ids in the order of the codes."""
        new, known = "SELECT DISTINCT item FROM events", ""
        if self._has_prior:
            new += " ANTI JOIN prior_items USING (item)"
            known = "SELECT item, code::INTEGER AS code FROM prior_items UNION ALL "
        order = FLIPPED.format("item") if unsigned else "item"
        first = "(SELECT count(*) FROM prior_items)" if self._has_prior else "0"
        self._database.execute(
            f"CREATE OR REPLACE TABLE codes AS {known}"
            f"SELECT item, ({first} + row_number() OVER (ORDER BY {order}) - 1)::INTEGER AS code FROM ({new})"
        )
        table = self._database.sql("SELECT item FROM codes ORDER BY code").to_arrow_table()
        return from_bits(table["item"].combine_chunks(), unsigned)

    def histories(self, unsigned: bool) -> Iterator[Histories]:
        """Yields whole users, each with its events ordered by time, then position.

        Users of the prior set come first, in the order of their rows, then the others in the order of their raw ids.

        Args:
            unsigned: whether the ids of users are unsigned numbers.
        """
        ((largest,),) = self._database.execute("SELECT max(fraction) FROM events").fetchall()
        self.has_fractions |= bool(largest)
        columns, joins = "user AS number, code, timestamp", "JOIN codes USING (item)"
        users = None
        if self._has_prior or unsigned or self._users_are_text():
            self._number_users(FLIPPED.format("user") if unsigned else "user")
            columns, joins = "number, code, timestamp", f"{joins} JOIN users USING (user)"
            # A second connection, because both results are read side by side.
            described = self._database.cursor().sql("SELECT user, row FROM users ORDER BY number")
            users = _Stream(described.to_arrow_reader(EVENTS_AT_ONCE))
        if self._has_prior:
            columns += ", place"
        features = [name for name in self._database.table("events").columns if name.startswith(FEATURE_PREFIX)]
        for name in features:
            columns += ', "' + name.replace('"', '""') + '"'
        order = "number, timestamp, position"
        if self.has_fractions:
            columns += ", fraction"
            order = "number, timestamp, fraction, position"
        query = f"SELECT {columns} FROM events {joins} ORDER BY {order}"
        for table in _whole_users(self._database.sql(query).to_arrow_reader(EVENTS_AT_ONCE)):
            starts = _user_starts(table["number"])
            num_events = table.num_rows
            if users:
                batch = users.take(starts.size)
                user_ids, rows = from_bits(batch["user"], unsigned), batch["row"].to_numpy()
            else:
                user_ids, rows = table["number"].take(pa.array(starts)).combine_chunks(), np.full(starts.size, -1)
            columns_of_events = {name: table[name].to_numpy() for name in features}
            if self.has_fractions:
                columns_of_events[FRACTIONS] = table["fraction"].to_numpy()
            yield Histories(
                user_ids=user_ids,
                rows=rows,
                offsets=np.append(starts, num_events),
                codes=table["code"].to_numpy(),
                times=table["timestamp"].to_numpy(),
                places=table["place"].to_numpy() if self._has_prior else np.full(num_events, NEW, np.int32),
                columns=columns_of_events,
            )

    def _users_are_text(self) -> bool:
        kind = self._database.execute("SELECT typeof(user) FROM events LIMIT 1").fetchall()
        return bool(kind) and kind[0][0] == "VARCHAR"

    def _number_users(self, order: str) -> None:
        """Numbers the users in their order, because sorting all events by text would take several times as long."""
        row, join = "-1::BIGINT", ""
        if self._has_prior:
            row, join = "coalesce(row, -1)", "LEFT JOIN prior_users USING (user)"
            order = f"row IS NULL, row, {order}"
        self._database.execute(
            f"CREATE OR REPLACE TABLE users AS SELECT user, {row} AS row, row_number() OVER (ORDER BY {order}) AS number "
            f"FROM (SELECT DISTINCT user FROM events) {join}"
        )


def was_interrupted(error: Exception) -> bool:
    """Whether this is how DuckDB reports a Ctrl-C."""
    return isinstance(error, duckdb.InterruptException) or (
        type(error) is RuntimeError and "interrupted" in str(error).lower()
    )


class _Stream:
    """Reads a stream of tables by a given number of rows at a time."""

    def __init__(self, reader: pa.RecordBatchReader) -> None:
        self._reader = reader
        self._rest = reader.schema.empty_table()

    def take(self, number: int) -> pa.RecordBatch:
        """The next ``number`` rows, which must exist."""
        tables = [self._rest]
        while sum(table.num_rows for table in tables) < number:
            tables.append(pa.Table.from_batches([self._reader.read_next_batch()]))
        table = pa.concat_tables(tables)
        self._rest = table.slice(number)
        return table.slice(0, number).combine_chunks().to_batches()[0]


def _whole_users(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yields tables that end with the last event of a user."""
    pending: list[pa.Table] = []
    for batch in reader:
        if not batch.num_rows:
            continue
        table = pa.Table.from_batches([batch])
        last = int(_user_starts(table["number"])[-1])
        if last == 0 and pending and pending[-1]["number"][-1].equals(table["number"][0]):
            pending.append(table)
            continue
        if last:
            pending.append(table.slice(0, last))
        if pending:
            yield pa.concat_tables(pending).combine_chunks()
        pending = [table.slice(last)]
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _user_starts(users: pa.ChunkedArray) -> IntArray:
    changes = pc.not_equal(users[1:], users[:-1]).to_numpy()
    return np.append(0, np.flatnonzero(changes) + 1).astype(np.int64)
