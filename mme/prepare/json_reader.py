"""Reads JSON lines as batches of columns, with the line of each row."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from mme.prepare.text_reader import BLOCK_BYTES, BYTE_ORDER_MARK, LONGEST_LINE_BYTES, UnreadableText


@dataclass(frozen=True)
class JsonBlock:
    """Some rows of a file.

    Attributes:
        columns: of the type of most values in the first rows, or text if the types in the block differ.
        lines: (rows,) int64, the line of each row in the file, from 1.
        broken_lines: the lines that are not a JSON object, or that have a wanted key twice.
    """

    columns: pa.RecordBatch
    lines: NDArray[np.int64]
    broken_lines: NDArray[np.int64]


def read_blocks(stream: pa.NativeFile, wanted: Sequence[str], block_bytes: int = BLOCK_BYTES) -> Iterator[JsonBlock]:
    """Yields the ``wanted`` keys, about ``block_bytes`` of the file at a time.

    Raises:
        UnreadableText: a line is too long.
    """
    schema: pa.Schema | None = None
    first_line = 1
    for text in _whole_lines(stream, block_bytes):
        schema = schema or _schema(text, wanted)
        num_lines = text.count(b"\n") + (not text.endswith(b"\n"))
        batch = _read_fast(text, schema)
        if batch is not None and batch.num_rows == num_lines:
            yield JsonBlock(batch, np.arange(first_line, first_line + num_lines), np.zeros(0, np.int64))
        else:
            yield _read_slowly(text, wanted, first_line)
        first_line += num_lines


def json_fields(line: str | bytes, once: Collection[str] | None = None) -> dict[str, Any] | None:
    """The fields of one JSON line; None if it is not an object or has a key of ``once`` (None: any key) twice."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs if once is None or key in once]
            if len(set(keys)) < len(keys):
                raise ValueError("a key twice")
        return found

    try:
        row = json.loads(line, object_pairs_hook=check)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _whole_lines(stream: pa.NativeFile, block_bytes: int) -> Iterator[bytes]:
    rest, lines = b"", 1
    data = stream.read(block_bytes).removeprefix(BYTE_ORDER_MARK)
    while data:
        following = stream.read(block_bytes)
        buffer = rest + data
        end = buffer.rfind(b"\n") + 1 if following else len(buffer)
        if end:
            lines += buffer.count(b"\n")
            yield buffer[:end]
        elif len(buffer) > LONGEST_LINE_BYTES:
            raise UnreadableText(f"line {lines}: longer than {LONGEST_LINE_BYTES >> 20} MiB")
        rest, data = buffer[end:], following


def _schema(text: bytes, wanted: Sequence[str]) -> pa.Schema:
    """The types of the first values: int64, float64, bool or text."""
    kinds: dict[str, pa.DataType] = {}
    for line in text.split(b"\n"):
        row = json_fields(line, wanted) or {}
        for name in wanted:
            value = row.get(name)
            if name not in kinds and value is not None:
                kinds[name] = next((kind for type, kind in _KINDS if isinstance(value, type)), pa.string())
        if len(kinds) == len(wanted):
            break
    return pa.schema([(name, kinds.get(name, pa.string())) for name in wanted])


_KINDS = [(bool, pa.bool_()), (int, pa.int64()), (float, pa.float64())]


def _read_fast(text: bytes, schema: pa.Schema) -> pa.RecordBatch | None:
    """Parses all lines by ``schema``, or with whole numbers up to 2^64 - 1; None if some line does not fit."""
    unsigned = pa.schema([(field.name, pa.uint64() if field.type == pa.int64() else field.type) for field in schema])
    for attempt in (schema, unsigned):
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(text),
                pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
                pyarrow.json.ParseOptions(explicit_schema=attempt, unexpected_field_behavior="ignore"),
            )
        except pa.ArrowException:
            continue
        return pa.RecordBatch.from_arrays([table[name].combine_chunks() for name in schema.names], schema=attempt)
    return None


def _read_slowly(text: bytes, wanted: Sequence[str], first_line: int) -> JsonBlock:
    """Parses line by line and keeps each value as the text in the file."""
    columns: dict[str, list[str | None]] = {name: [] for name in wanted}
    lines, broken = [], []
    for number, line in enumerate(text.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        row = json_fields(line, wanted)
        if row is None:
            broken.append(number)
            continue
        lines.append(number)
        for name, values in columns.items():
            values.append(_as_text(row.get(name)))
    arrays = [pa.array(columns[name], pa.string()) for name in wanted]
    batch = pa.RecordBatch.from_arrays(arrays, list(wanted))
    return JsonBlock(batch, np.array(lines, np.int64), np.array(broken, np.int64))


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, (dict, list)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value != value:
            return None
        return str(int(value)) if value.is_integer() and abs(value) <= 2**53 else repr(value)
    text = str(value)
    # Half of a surrogate pair, which JSON can write and UTF-8 can't, becomes U+FFFD.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
