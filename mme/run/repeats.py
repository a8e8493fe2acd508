"""Keeps a line that repeats from filling a log: the first of its kind is written, then the 10th, the 100th and so on."""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from typing import TextIO

from mme.errors import indented_lines

MOST_KINDS = 1000  # that are counted; what comes after them is left out
_NUMBER = re.compile(r"\d+")


class RepeatLimit:
    """Counts lines by kind: two that differ only in their numbers are of one kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def line(self, text: str) -> str | None:
        """What is to be written for ``text``: itself, with its count where it is a repeat; None: nothing."""
        kind = _NUMBER.sub("#", text)
        if kind not in self._counts and len(self._counts) >= MOST_KINDS:
            return None
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count == 1:
            return text
        return f"{text} ({count:,} times so far)" if _is_power_of_ten(count) else None


class LibraryLog(logging.StreamHandler[TextIO]):
    """Writes what libraries warn of through `logging` to a rank's log, each kind of line with a `RepeatLimit`.

    A log that can't be written to, on a full disk, is no matter here: a library's warning must not end the job, nor print
    pages of its own. The monitor's next line reports it.
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
