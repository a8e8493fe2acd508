"""Errors that end a command with one line."""

from __future__ import annotations

import errno
import sys
from typing import TextIO

LONGEST_LINE = 4000
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors that a retry cannot solve


class UserError(Exception):
    """Wrong input or configuration: commands print its one line and exit with status 2.

    The message names the file, row, key or value, what was found and what was expected, for example
    ``events.csv: no column 'timestamp' (found: userId, movieId, rating)``.
    """


class JobError(Exception):
    """The job cannot continue, and all ranks know it: rank 0 prints one line and all exit with status 1."""


class NonFiniteError(JobError):
    """A loss, gradient, weight or vector is NaN or infinite, so results that depend on it would be wrong.

    ``step``: the step whose state is not finite, if it differs from the step that training has reached.
    """

    step: int | None = None


class FinalError(JobError):
    """A retry would fail too, so the launcher does not restart the job."""


class DiskError(FinalError):
    """A file cannot be written, and a retry could not write it either."""


class Preempted(Exception):
    """The job was asked to stop (SIGTERM) and has saved a checkpoint: all ranks exit with status 143."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: str) -> str:
    """``text`` with every control character, line break and unpaired surrogate escaped, as ``\\n`` or ``\\x1b``.

    Names and values in a message may come from untrusted files. Escaping keeps them from breaking a log's lines, moving
    the terminal's cursor or reversing the text that follows. A text longer than `LONGEST_LINE` characters loses its
    middle.
    """
    if len(text) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Prints ``text`` as one line, escaped by `one_line`, on standard error unless ``file`` is given."""
    print(one_line(text), file=file or sys.stderr, flush=True)


def indented_lines(text: str) -> str:
    """Formats a text of several lines, such as a traceback, for a log.

    `one_line` escapes each line; all lines except the first are indented.
    """
    return "\n    ".join(map(one_line, text.rstrip().split("\n")))
