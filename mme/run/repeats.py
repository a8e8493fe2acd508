"""Keeps repeated lines from filling a log: the first line of a kind is written, then the 10th, the 100th and so on."""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from typing import TextIO

from mme.errors import indented_lines

MOST_KINDS = 1000  # that are counted; lines of further kinds are left out
_NUMBER = re.compile(r"\d+")


class RepeatLimit:
    """Counts lines by kind. Lines that differ only in their numbers have the same kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def line(self, text: str) -> str | None:
        """The line to write for ``text``: itself, with its count if it is a repeat; None: nothing."""
        kind = _NUMBER.sub("#", text)
        if kind not in self._counts and len(self._counts) >= MOST_KINDS:
            return None
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count == 1:
            return text
        return f"{text} ({count:,} times so far)" if _is_power_of_ten(count) else None


class LibraryLog(logging.StreamHandler[TextIO]):
    """Writes the libraries' warnings from `logging` to a rank's log, under a `RepeatLimit`.

    Failing to write, on a full disk for example, is ignored here: a library's warning must neither end the job nor print
    pages of errors. The monitor's next line reports the full disk.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self._limit = RepeatLimit()

    def emit(self, record: logging.LogRecord) -> None:
        text = self._limit.line(self.format(record).rstrip())
        if text is not None:
            with suppress(OSError, ValueError):
                self.stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {indented_lines(text)}\n")


def _is_power_of_ten(count: int) -> bool:
    return str(count).rstrip("0") == "1"
