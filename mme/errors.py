"""Errors that end a command with one line."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input or configuration: the commands print its one line and leave with status 2.

    The message names the file, row, key or value, what was found and what was expected, for example
    ``events.csv: no column 'timestamp' (found: userId, movieId, rating)``.
    """


class JobError(Exception):
    """The job can't go on, and all ranks know it: rank 0 prints the one line, and all leave with status 1."""


class Preempted(Exception):
    """The job was asked to stop (SIGTERM) and has saved all: all ranks leave with status 143, to be started again."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line; where it says nothing, what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
