"""The one kind of error that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input or configuration: the commands print its one line and leave with status 2.

    The message names the file, row, key or value, what was found and what was expected, for example
    ``events.csv: no column 'timestamp' (found: userId, movieId, rating)``.
    """
