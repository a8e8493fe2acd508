"""What the start of a file shows: whether it is Parquet, Arrow or text, its columns, and its first lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from mme.data.parquet import READ_ERRORS
from mme.errors import UserError, first_line
from mme.prepare.input_file import InputFile, open_random_access, open_stream

TypedKind = Literal["parquet", "arrow"]
TYPED_NAMES: dict[TypedKind, str] = {"parquet": "Parquet", "arrow": "Arrow"}
PARQUET_START, ARROW_FILE_START, ARROW_STREAM_START = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
FIRST_BYTES = 1 << 18
OTHER_FILES = {
    b"\xff\xfe": "is UTF-16: expected UTF-8",
    b"\xfe\xff": "is UTF-16: expected UTF-8",
    b"PK\x03\x04": "is a ZIP archive (or a spreadsheet): expected it unpacked, as CSV, JSON lines or Parquet",
    b"\x1f\x8b": "is compressed with gzip: expected a name that ends in .gz",
    b"BZh": "is compressed with bzip2: expected a name that ends in .bz2",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: expected a name that ends in .zst",
}


def typed_kind(path: InputFile) -> TypedKind | None:
    """The kind of a file of typed columns; None for text.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with open_random_access(path) as file:
            start = file.read(len(ARROW_FILE_START))
    except READ_ERRORS as error:
        raise UserError(f"{path}: can't be read: {first_line(error)}") from error
    if start.startswith(PARQUET_START):
        return "parquet"
    return "arrow" if start.startswith((ARROW_FILE_START, ARROW_STREAM_START)) else None


def typed_names(path: InputFile, kind: TypedKind) -> list[str]:
    """The names of the columns of a file of typed columns.

    Raises:
        UserError: the file is damaged or of another kind.
    """
    try:
        with open_random_access(path) as file:
            if kind == "parquet":
                names: list[str] = pq.read_schema(file).names
            else:
                names = ArrowBatches(file).schema.names
        return names
    except READ_ERRORS as error:
        raise UserError(
            f"{path}: not a readable {TYPED_NAMES[kind]} file, perhaps truncated ({first_line(error)})"
        ) from error


class ArrowBatches:
    """The record batches of an Arrow file or stream, with only the columns ``names`` if they are given."""

    def __init__(self, file: pa.NativeFile, names: list[str] | None = None) -> None:
        start = file.read(len(ARROW_FILE_START))
        is_file = start == ARROW_FILE_START
        if not is_file:
            # A stream that was cut off between two batches looks complete but for this mark.
            file.seek(max(file.size() - len(ARROW_STREAM_END), 0))
            if file.read() != ARROW_STREAM_END:
                raise pa.ArrowInvalid("no mark at the end of the stream")
        file.seek(0)
        open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        self._reader = open_reader(file)
        self.schema: pa.Schema = self._reader.schema
        if names is not None:
            fields = [self.schema.get_field_index(name) for name in names]
            file.seek(0)
            self._reader = open_reader(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        self._count = self._reader.num_record_batches if is_file else None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        if self._count is None:
            yield from self._reader
        else:
            yield from map(self._reader.get_batch, range(self._count))


def first_lines(path: InputFile) -> list[str]:
    """The first complete lines of a text file, compressed or not.

    Raises:
        UserError: the file can't be read, is empty, or is something other than text.
    """
    try:
        with open_stream(path) as stream:
            start = stream.read(FIRST_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read: {first_line(error)}") from error
    for magic, message in OTHER_FILES.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {message}")
    if b"\r" in start and b"\n" not in start:
        raise UserError(f"{path}: lines end with CR only: expected LF or CRLF")
    text = start.decode("utf-8-sig", errors="replace")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if len(start) == FIRST_BYTES and len(lines) > 1:
        del lines[-1]  # perhaps cut off
    while lines and not lines[0].strip():
        del lines[0]
    if not lines:
        raise UserError(f"{path}: empty file: expected interactions")
    if "\0" in lines[0]:
        raise UserError(f"{path}: neither Parquet, Arrow nor text")
    if lines[0].lstrip().startswith("["):
        raise UserError(
            f"{path}: line 1: starts with '[', as a JSON array does: expected one JSON object per line, or CSV"
        )
    return lines
