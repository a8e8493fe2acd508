"""One file of interactions → batches of raw columns, in the order of the file, with the place of each row for messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mme.errors import UserError, first_line

NULL_TEXTS = ["", "NULL", "null", "NaN", "nan", "None", "none", "NA", "N/A", "\\N"]
BLOCK_BYTES = 8 << 20
PARQUET_ROWS = 1 << 18


@dataclass
class SourceFile:
    """One file and how to read it.

    Attributes:
        columns: role (user, item, timestamp; rating, click, … where a filter asks for them) → name of the column.
        kind: what the bytes are.
        time_unit: how many of the times' units make a second; None: told by their size.
        separator: of text.
        header: the names of all columns in order, for text without a header line; None: it has one.
        text_ids: ids are text even where they look like numbers.
        loose_times: times have fractions of a second and may be missing, as published.
        broken_lines: numbers of the lines that can't be taken apart into fields, as they are met.
        rows_read: rows of the batches before the present one.
    """

    path: Path
    columns: dict[str, str]
    kind: Literal["parquet", "text", "json"]
    time_unit: int | None = None
    separator: str = ","
    header: list[str] | None = None
    text_ids: bool = False
    loose_times: bool = False
    broken_lines: list[int] = field(default_factory=list)
    rows_read: int = 0

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Record batches with one column a role; text columns as text."""
        names = list(dict.fromkeys(self.columns.values()))
        try:
            if self.kind == "parquet":
                with pq.ParquetFile(self.path) as file:
                    yield from self._pick(file.iter_batches(PARQUET_ROWS, columns=names))
            elif self.kind == "json":
                with pa.input_stream(str(self.path)) as stream:
                    yield from self._pick(self._json_batches(stream, names))
            else:
                with self._open_text(names) as reader:
                    yield from self._pick(reader)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: can't be read to its end: {first_line(error)}") from error

    def place(self, row: int) -> str:
        """Where row number ``row`` (from 0, broken lines not counted) stands, for a message."""
        if self.kind == "parquet":
            return f"row {row}"
        line = row + (2 if self.kind == "text" and self.header is None else 1)
        for broken in self.broken_lines:  # in rising order
            if broken <= line:
                line += 1
        return f"line {line}"

    def _pick(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_arrays([batch.column(name) for name in self.columns.values()], list(self.columns))
            self.rows_read += batch.num_rows

    def _open_text(self, names: list[str]) -> pyarrow.csv.CSVStreamingReader:
        def skip(row: pyarrow.csv.InvalidRow) -> str:
            self.broken_lines.append(row.number)
            return "skip"

        return pyarrow.csv.open_csv(
            pa.input_stream(str(self.path)),
            # One thread: the numbers of broken lines are known only then.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=self.header),
            pyarrow.csv.ParseOptions(delimiter=self.separator, invalid_row_handler=skip),
            pyarrow.csv.ConvertOptions(
                include_columns=names,
                column_types={name: pa.string() for name in names},
                null_values=NULL_TEXTS,
                strings_can_be_null=True,
            ),
        )

    def _json_batches(self, stream: pa.NativeFile, names: list[str]) -> Iterator[pa.RecordBatch]:
        """The named fields of JSON lines, with the types that they have first."""
        schema: pa.Schema | None = None
        lines_before = 0
        for text in _whole_lines(stream):
            schema = schema or self._json_schema(text, names)
            try:
                yield _json_fast(text, schema)
            except pa.ArrowException:
                yield self._json_slowly(text, schema, lines_before)
            lines_before += text.count(b"\n") + 1

    def _json_schema(self, text: bytes, names: list[str]) -> pa.Schema:
        kinds: dict[str, pa.DataType] = {}
        for line in text.split(b"\n"):
            row = json_fields(line) or {}
            for name in names:
                if row.get(name) is not None and name not in kinds:
                    kinds[name] = self._json_kind(name, row[name])
            if len(kinds) == len(names):
                break
        for role, name in self.columns.items():
            if role not in ("user", "item", "timestamp") and kinds.get(name) == pa.int64():
                kinds[name] = pa.float64()  # a rating of 5 may be followed by one of 4.5
        return pa.schema([(name, kinds.get(name, pa.string())) for name in names])

    def _json_kind(self, name: str, value: Any) -> pa.DataType:
        try:
            return pa.scalar(value).type
        except OverflowError as error:
            raise UserError(
                f"{self.path}: column {name!r} holds {value}, expected a whole number below 2^63, or a text"
            ) from error

    def _json_slowly(self, text: bytes, schema: pa.Schema, lines_before: int) -> pa.RecordBatch:
        """Line by line, each that is no JSON object counted as broken; a value of another type counts as none."""
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for number, line in enumerate(text.split(b"\n"), start=lines_before + 1):
            if not line.strip():
                continue
            row = json_fields(line)
            if row is None:
                self.broken_lines.append(number)
                continue
            for name, values in columns.items():
                values.append(_as_type(row.get(name), schema.field(name).type))
        return pa.record_batch([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema)


def json_fields(line: str | bytes) -> dict[str, Any] | None:
    """The fields of one line of JSON; None: it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _whole_lines(stream: pa.NativeFile) -> Iterator[bytes]:
    """Blocks of lines, without the newline at their end."""
    rest = b""
    while block := stream.read(BLOCK_BYTES):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield whole
    if rest:
        yield rest


def _json_fast(text: bytes, schema: pa.Schema) -> pa.RecordBatch:
    table = pyarrow.json.read_json(
        pa.BufferReader(text),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    return pa.RecordBatch.from_arrays([table[name].combine_chunks() for name in schema.names], schema=schema)


def _as_type(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None
