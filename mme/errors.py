"""Errors that end a command with one line."""

from __future__ import annotations

import errno

LONGEST_LINE = 4000
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # that freeing room, not another attempt, mends


class UserError(Exception):
    """Wrong input or configuration: commands print its one line and exit with status 2.

    The message names the file, row, key or value, what was found and what was expected, for example
    ``events.csv: no column 'timestamp' (found: userId, movieId, rating)``.
    """


class JobError(Exception):
    """The job can't continue, and all ranks know it: rank 0 prints the one line and all exit with status 1."""


class NonFiniteError(JobError):
    """A loss, gradient, weight or vector is NaN or infinite, so no result that depends on it can be right."""


class DiskError(JobError):
    """A file can't be written, and the next attempt could not write it either: the job is not started again."""


class Preempted(Exception):
    """The job was asked to stop (SIGTERM) and has saved all: all ranks leave with status 143, to be started again."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: str) -> str:
    """``text`` with every control character, line break and unpaired surrogate escaped, as ``\\n`` or ``\\x1b``.

    Names and values in a message come from files that anybody may have made. Escaped, they can't break a line of a log,
    move the terminal's cursor or reverse the text that follows. What exceeds `LONGEST_LINE` characters is cut out of the middle.
    """
    if len(text) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def indented_lines(text: str) -> str:
    """A text of several lines, such as a traceback, for a log: each line escaped by `one_line`, all but the first indented."""
    return "\n    ".join(map(one_line, text.rstrip().split("\n")))
