"""Reads CSV and similar text as batches of text columns, with the line of each row; every line is accounted for."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from mme.prepare.quoting import OpenQuote, RecordSplitter, TextRecords

NULL_TEXTS = ["", "NULL", "null", "NaN", "nan", "None", "none", "NA", "N/A", "\\N"]
BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20
QUOTE = '"'
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnreadableText(Exception):
    """A text that can't be split into rows; the message names the line."""


@dataclass(frozen=True)
class TextBlock:
    """Some rows of a file.

    Attributes:
        columns: text columns, null if a value is missing; U+FFFD stands for bytes that are not UTF-8.
        lines: (rows,) int64, the line of the file, from 1, on which each row starts.
        broken_lines: the lines of records with a wrong number of fields, which don't become rows.
    """

    columns: pa.RecordBatch
    lines: NDArray[np.int64]
    broken_lines: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        separator: character between fields.
        names: names of all columns, in order.
        header_lines: number of lines before the first row.
        blanks_before_quotes: whether a field may be quoted after blanks, as in `1, "a, b"`.
    """

    separator: str
    names: list[str]
    header_lines: int = 1
    blanks_before_quotes: bool = False


def read_header(lines: Sequence[str], separator: str) -> tuple[list[str], int, bool]:
    """The fields of the first record, without blanks around them; how many lines it takes; whether any field is quoted
    after blanks."""
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=separator, skipinitialspace=True)
    fields = [field.strip() for field in next(reader, [])]
    blanks = re.search(rf'(?:^|{re.escape(separator)})[ \t]+"', "\n".join(lines[: reader.line_num])) is not None
    return fields, reader.line_num, blanks and separator != "\t"


def read_blocks(
    stream: pa.NativeFile,
    layout: Layout,
    wanted: Sequence[str],
    splitter: RecordSplitter,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[TextBlock]:
    """Yields the ``wanted`` columns, about ``block_bytes`` of the file at a time.

    Raises:
        UnreadableText: a quote can be read in two ways, a line is too long, or lines and rows don't add up.
    """
    first_line, rest = 1, b""
    skip = layout.header_lines
    data = stream.read(block_bytes)
    data = data.removeprefix(BYTE_ORDER_MARK)
    while data or rest:
        following = stream.read(block_bytes) if data else b""
        buffer = rest + data
        end = buffer.rfind(b"\n") + 1 if following else len(buffer)
        if end == 0 and len(buffer) > LONGEST_LINE_BYTES:
            raise UnreadableText(f"line {first_line}: longer than {LONGEST_LINE_BYTES >> 20} MiB")
        block, after = buffer[:end], buffer[end:]
        while skip and block:
            line, _, block = block.partition(b"\n")
            first_line += 1
            if line.strip() or skip < layout.header_lines:  # there may be blank lines before the header
                skip -= 1
        rest, data = after, following
        if not block:
            continue
        try:
            records = splitter.split(_tidy(block, layout), is_last=not following)
        except OpenQuote as error:
            raise UnreadableText(
                f"line {first_line + error.line}: a quote opens here {error.reason}; give --quoting literal if quotes "
                "are characters like others, --quoting standard if they enclose fields"
            ) from None
        rest = records.rest + after
        yield _parse(records, layout, wanted, first_line)
        first_line += records.num_lines


def _tidy(block: bytes, layout: Layout) -> bytes:
    """The block as UTF-8 with lines that end with LF or CRLF."""
    if block.count(b"\r") != block.count(b"\r\n"):  # the CSV parser takes a single CR for the end of a line
        block = re.sub(rb"\r(?!\n)", b" ", block)
    if not block.isascii():
        try:
            block.decode()
        except UnicodeDecodeError:
            block = block.decode(errors="replace").encode()
    if layout.blanks_before_quotes:
        block = re.sub(rf'(?m)(^|{re.escape(layout.separator)})[ \t]+(?=")'.encode(), rb"\1", block)
    return block


def _parse(records: TextRecords, layout: Layout, wanted: Sequence[str], first_line: int) -> TextBlock:
    broken: list[int] = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        broken.append(row.number - 1)
        return "skip"

    lines = np.arange(records.num_lines) if records.lines is None else records.lines
    numbers = [str(layout.names.index(name)) for name in wanted]
    columns = pa.record_batch([pa.array([], pa.string())] * len(wanted), list(wanted))
    if lines.size:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(records.data),
            # The numbers of broken rows are known only with one thread and one block.
            pyarrow.csv.ReadOptions(
                use_threads=False,
                block_size=len(records.data) + 1,
                column_names=[str(number) for number in range(len(layout.names))],
            ),
            pyarrow.csv.ParseOptions(
                delimiter=layout.separator,
                quote_char=QUOTE if records.has_quotes else False,
                newlines_in_values=records.has_quotes,
                invalid_row_handler=skip,
            ),
            pyarrow.csv.ConvertOptions(
                include_columns=numbers,
                column_types={number: pa.string() for number in numbers},
                null_values=NULL_TEXTS,
                strings_can_be_null=True,
            ),
        )
        columns = pa.RecordBatch.from_arrays([table[number].combine_chunks() for number in numbers], list(wanted))
    if columns.num_rows + len(broken) != lines.size:
        raise UnreadableText(
            f"lines {first_line} to {first_line + records.num_lines - 1}: {lines.size} records were expected, but "
            f"{columns.num_rows} rows and {len(broken)} with a wrong number of fields were read"
        )
    lines = lines + first_line
    return TextBlock(columns, np.delete(lines, broken), lines[broken])
