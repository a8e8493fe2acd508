"""Reads a file of interactions as batches of raw columns, in order, and knows the place of each row for messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.data.parquet import READ_ERRORS
from mme.errors import UserError, first_line
from mme.prepare import json_reader, text_reader
from mme.prepare.file_start import ArrowBatches
from mme.prepare.input_file import InputFile, open_random_access, open_stream
from mme.prepare.quoting import Quoting, RecordSplitter
from mme.prepare.text_reader import Layout, UnreadableText

if TYPE_CHECKING:
    from mme.prepare.times import TimeForm

ROLES = ("user", "item", "timestamp")
PARQUET_ROWS = 1 << 18
# How much of a file is read to determine how its times and ids are written.
SAMPLE_BYTES = 1 << 20
SAMPLE_ROWS = 1 << 15


@dataclass
class SourceFile:
    """One file and how to read it.

    Attributes:
        columns: role (user, item, timestamp; rating, click, … if a filter needs them) → name of the column.
        kind: encoding of the bytes.
        format: recognised format of the file.
        layout: layout of a text file.
        quoting: what `"` means in a text file.
        time_unit: the unit given by the format or the column's name; None: recognised by the size of the times.
        time_form: how the times are written, as soon as it is known.
        text_ids: ids are text even if they look like numbers.
        times_may_be_missing: the published file has rows without a time, which are not malformed.
        broken_rows: number of lines so far that could not be split into fields.
        broken_lines: the first of them.
        rows_read: number of rows in the batches before the current one.
    """

    path: InputFile
    columns: dict[str, str]
    kind: Literal["parquet", "arrow", "text", "json"]
    format: str = ""
    layout: Layout = field(default_factory=lambda: Layout(",", []))
    quoting: Quoting = "auto"
    time_unit: str | None = None
    time_form: TimeForm | None = None
    text_ids: bool = False
    times_may_be_missing: bool = False
    broken_rows: int = 0
    broken_lines: list[int] = field(default_factory=list)
    rows_read: int = 0
    _lines: NDArray[np.int64] | None = None  # of the rows of the present batch

    def sample(self) -> pa.RecordBatch | None:
        """The first rows, in the form of `batches`; None if there are none. `place` then refers to them."""
        for batch in self._batches(SAMPLE_ROWS, SAMPLE_BYTES):
            if batch.num_rows:
                return batch
        return None

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields record batches with one column per role; CSV columns are text."""
        self.rows_read = self.broken_rows = 0
        self.broken_lines = []
        for batch in self._batches(PARQUET_ROWS, text_reader.BLOCK_BYTES):
            yield batch
            self.rows_read += batch.num_rows

    def place(self, row: int) -> str:
        """The place of row number ``row`` (from 0) of the current batch, for a message."""
        if self._lines is None:
            return f"row {self.rows_read + row}"
        return f"line {self._lines[row]}"

    def _batches(self, rows: int, num_bytes: int) -> Iterator[pa.RecordBatch]:
        names = list(dict.fromkeys(self.columns.values()))
        try:
            if self.kind == "parquet":
                yield from map(self._by_role, self._parquet(names, rows))
            elif self.kind == "arrow":
                yield from map(self._by_role, self._arrow(names, rows))
            else:
                with open_stream(self.path) as stream:
                    yield from map(self._by_role, self._text(stream, names, num_bytes))
        except UnreadableText as error:
            raise UserError(f"{self.path}: {error}") from error
        except READ_ERRORS as error:
            raise UserError(f"{self.path}: can't be read to its end: {first_line(error)}") from error

    def _by_role(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([batch.column(name) for name in self.columns.values()], list(self.columns))

    def _parquet(self, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        # A sample decodes the first pages only.
        with (
            open_random_access(self.path) as source,
            pq.ParquetFile(source, pre_buffer=rows == PARQUET_ROWS) as file,
        ):
            yield from file.iter_batches(rows, columns=names)

    def _arrow(self, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with open_random_access(self.path) as source:
            waiting: list[pa.RecordBatch] = []  # a batch as written often has a thousand rows only
            for batch in ArrowBatches(source, names):
                batch.validate(full=True)
                waiting.append(_without_views(batch))
                if sum(each.num_rows for each in waiting) >= rows:
                    yield from _joined(waiting, rows)
                    waiting = []
            if waiting:
                yield from _joined(waiting, rows)

    def _text(self, stream: pa.NativeFile, names: list[str], num_bytes: int) -> Iterator[pa.RecordBatch]:
        blocks: Iterable[text_reader.TextBlock | json_reader.JsonBlock]
        if self.kind == "json":
            blocks = json_reader.read_blocks(stream, names, num_bytes)
        else:
            time_field = self.layout.names.index(self.columns.get("timestamp", self.columns["item"]))
            splitter = RecordSplitter(self.layout.separator, len(self.layout.names), time_field, self.quoting)
            blocks = text_reader.read_blocks(stream, self.layout, names, splitter, num_bytes)
        for block in blocks:
            self._lines = block.lines
            self.broken_rows += block.broken_lines.size
            self.broken_lines += block.broken_lines[: 3 - len(self.broken_lines)].tolist()
            yield block.columns


def _without_views(batch: pa.RecordBatch) -> pa.RecordBatch:
    """``batch`` with its views, which Polars writes, as plain text and binary; pyarrow can't filter views."""
    schema = batch.schema
    for number, column in enumerate(schema):
        if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
            is_text = pa.types.is_string_view(column.type)
            schema = schema.set(number, column.with_type(pa.large_string() if is_text else pa.large_binary()))
    return batch if schema == batch.schema else batch.cast(schema)


def _joined(batches: list[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The batches as batches of at most ``rows`` rows."""
    table = pa.Table.from_batches(batches).combine_chunks()
    yield from table.to_batches(max_chunksize=rows)
