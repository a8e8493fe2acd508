"""Finds where the records of a CSV block end, and which `"` enclose a field and which are plain characters.

A line is a record by itself if every field is either quoted as a whole or does not begin with `"` (RFC 4180; a `"` inside
such a field is a character). A line may also end inside a quoted field that is closed on a later line: a quoted line
break. Any other `"` at the start of a field is stray, and its line is rewritten so that the parser reads a character.
A quote that is closed but would enclose whole rows could be either and is rejected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Quoting = Literal["auto", "standard", "literal"]
QUOTING = ["auto", "standard", "literal"]
LONGEST_FIELD_BYTES = 16 << 20  # a quote that is not closed within this is stray


class OpenQuote(Exception):
    """A quote that can be read in two ways.

    Attributes:
        line: the line of the block, from 0, on which it opens.
        reason: what is wrong, as the end of a sentence that begins with "a quote opens here".
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class TextRecords:
    """
    Attributes:
        data: bytes that a CSV parser reads as exactly these records.
        lines: (records,) int64, the line of the block, from 0, on which each starts; blank lines are not records. None: every
            line is a record.
        num_lines: lines of the block that are used.
        rest: the remaining bytes, from the first line that can't be decided without the text after it.
        has_quotes: whether fields are enclosed in quotes.
    """

    data: bytes
    lines: NDArray[np.int64] | None
    num_lines: int
    rest: bytes
    has_quotes: bool


class RecordSplitter:
    """
    Args:
        separator: character between fields.
        num_fields: number of fields of a complete row.
        time_field: number of the field of the time, from 0.
    """

    def __init__(self, separator: str, num_fields: int, time_field: int, quoting: Quoting) -> None:
        self._separator, self._num_fields, self._quoting = separator.encode(), num_fields, quoting
        s = re.escape(separator)
        quoted = r'"(?:[^"]|"")*"'
        field = rf'(?:{quoted}|[^"{s}\n][^{s}\n]*|)'
        end = r"\r?\n?$"
        inside = r'(?:[^"]|"")*'
        self._whole = rf"^{field}(?:{s}{field})*{end}"
        self._opens = rf'^(?:{field}{s})*"{inside}$'
        self._inside = rf"^{inside}$"
        self._closes = rf'^{inside}"(?:{s}{field})*{end}'
        self._reopens = rf'^{inside}"(?:{s}{field})*{s}"{inside}$'
        self._like_row = rf'^(?:[^{s}\n]*{s}){{{time_field}}}\s*"?[-+:./\dTZ ]*\d[-+:./\dTZ ]*"?\s*(?:{s}|{end})'

    def split(self, block: bytes, is_last: bool) -> TextRecords:
        """Splits whole lines into records; ``is_last``: the file has no more lines.

        Raises:
            OpenQuote: see the class.
        """
        if self._quoting == "literal" or b'"' not in block:
            return _lines_as_records(block, has_quotes=False)
        bounds = _line_bounds(block)
        lines = pa.Array.from_buffers(
            pa.binary(), bounds.size - 1, [None, pa.py_buffer(bounds.astype(np.int32)), pa.py_buffer(block)]
        )
        whole = self._match(lines, self._whole)
        if whole.all():
            return _lines_as_records(block, has_quotes=True)
        joined, literal, end = self._walk(lines, bounds, whole, is_last)
        if literal:
            pieces, begin = [], 0
            for line in literal:
                pieces += [block[begin : bounds[line]], self._as_characters(block[bounds[line] : bounds[line + 1]])]
                begin = bounds[line + 1]
            data = b"".join([*pieces, block[begin : bounds[end]]])
        else:
            data = block[: bounds[end]]
        starts = _is_not_blank(block, bounds)[:end] & ~joined[:end]
        return TextRecords(data, np.flatnonzero(starts), end, block[bounds[end] :], True)

    def _walk(
        self, lines: pa.Array, bounds: NDArray[np.int64], whole: NDArray[np.bool_], is_last: bool
    ) -> tuple[NDArray[np.bool_], list[int], int]:
        """Which lines continue the record before them, which have stray quotes, and the first undecided line."""
        opens, closes, reopens = (self._match(lines, p) for p in (self._opens, self._closes, self._reopens))
        not_inside = np.flatnonzero(~self._match(lines, self._inside))
        separators = np.asarray(pc.count_substring(lines, self._separator))
        like_row = self._match(lines, self._like_row) & (separators == self._num_fields - 1)
        rows_before = np.append(0, np.cumsum(like_row))
        joined = np.zeros(len(lines), bool)
        literal: list[int] = []
        next_free = 0
        for line in np.flatnonzero(~whole).tolist():
            if line < next_free:
                continue
            next_free = line + 1
            if not opens[line]:
                self._stray(line, literal, "closes before the end of its field")
                continue
            close = line
            while True:
                place = np.searchsorted(not_inside, close, side="right")
                close = int(not_inside[place]) if place < not_inside.size else -1
                if close < 0 or not reopens[close]:
                    break
            if close < 0 and not is_last and bounds[-1] - bounds[line] < LONGEST_FIELD_BYTES:
                return joined, literal, line
            if close < 0 or not closes[close]:
                self._stray(line, literal, "is never closed")
                continue
            swallowed = int(rows_before[close + 1] - rows_before[line + 1])
            if swallowed and self._quoting == "auto":
                raise OpenQuote(
                    line,
                    f"and closes {_lines(close - line)} later, past {_lines(swallowed)} that could be separate rows",
                )
            joined[line + 1 : close + 1] = True
            next_free = close + 1
        return joined, literal, len(lines)

    def _stray(self, line: int, literal: list[int], reason: str) -> None:
        if self._quoting == "standard":
            raise OpenQuote(line, f"that {reason}")
        literal.append(line)

    def _as_characters(self, line: bytes) -> bytes:
        """The line with its quotes doubled inside quoted fields, so that they are read as characters."""
        text = line.rstrip(b"\r\n")
        fields = [
            b'"' + field.replace(b'"', b'""') + b'"' if b'"' in field else field
            for field in text.split(self._separator)
        ]
        return self._separator.join(fields) + b"\n"

    @staticmethod
    def _match(lines: pa.Array, pattern: str) -> NDArray[np.bool_]:
        return pc.match_substring_regex(lines, pattern).to_numpy(zero_copy_only=False)


def _lines(number: int) -> str:
    return f"{number} line" if number == 1 else f"{number} lines"


def _lines_as_records(block: bytes, has_quotes: bool) -> TextRecords:
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    lines = None
    if block.startswith((b"\n", b"\r\n")) or b"\n\n" in block or b"\n\r\n" in block:
        lines = np.flatnonzero(_is_not_blank(block, _line_bounds(block)))
    return TextRecords(block, lines, num_lines, b"", has_quotes)


def _line_bounds(block: bytes) -> NDArray[np.int64]:
    """(lines + 1,) the start of each line, and the end of the last one."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    if not ends.size or ends[-1] < len(block):
        ends = np.append(ends, len(block))
    return np.append(0, ends)


def _is_not_blank(block: bytes, bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(lines,) whether a line has more than its line break."""
    lengths = np.diff(bounds)
    short = np.flatnonzero(lengths <= 2)
    not_blank = np.ones(lengths.size, bool)
    for line in short.tolist():
        not_blank[line] = bool(block[bounds[line] : bounds[line + 1]].strip(b"\r\n"))
    return not_blank
