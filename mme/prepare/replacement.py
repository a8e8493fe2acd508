"""Replaces a folder atomically, even if the process is killed.

The new folder is filled next to the old one under a fixed other name, so that the next run finds what a killed one has left. At
the end one system call exchanges the two (renameat2 with RENAME_EXCHANGE). If the file system cannot exchange, two renames do it,
and the next run restores the older folder if the process died between them. A lock file distinguishes a run in progress from what
a dead one has left: the kernel releases its flock when the holder dies.

Anybody could put a link in place of the lock, the new folder or the older one. Such links are removed, never followed.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from types import TracebackType

from mme.errors import UserError
from mme.files import flush, is_regular, release_lock, remove, take_lock

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class FolderReplacement:
    """`commit` replaces ``output`` by ``partial``. If the context ends without it, nothing has changed.

    Raises:
        UserError: another process is writing ``output``, or its parent folder can't be written to.
    """

    def __init__(self, output: Path, kept: Path | None = None) -> None:
        """``kept``: a file in a folder of ``partial``; if it exists, that folder survives an interruption."""
        # If the user's path is a link, its target is replaced. An exchange with the link itself would leave the older set.
        self.output, self._kept = Path(os.path.realpath(output)), kept
        absolute = self.output
        self.partial = absolute.with_name(f".{absolute.name}.partial")
        self._older = absolute.with_name(f".{absolute.name}.older")
        self._lock_file = absolute.with_name(f".{absolute.name}.lock")
        self._lock = -1

    def __enter__(self) -> FolderReplacement:
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self._lock_file)
        except BlockingIOError as error:
            raise UserError(f"{self.output}: another `mme prepare` is writing it") from error
        except OSError as error:
            raise UserError(f"{self.output}: can't be written: {error.strerror}") from error
        try:
            if self._older.is_dir() and not self._older.is_symlink() and not self.output.exists():
                os.rename(self._older, self.output)
            if not self._remove_leftovers(self._kept):
                self.partial.mkdir()
        except OSError as error:
            release_lock(self._lock_file, self._lock)
            raise UserError(f"{self.output}: can't be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove_leftovers(self._kept if kind is KeyboardInterrupt else None)
        release_lock(self._lock_file, self._lock)

    def commit(self) -> None:
        """Makes the content of ``partial`` durable and replaces ``output`` by it in a single step."""
        for path in [*self.partial.iterdir(), self.partial]:
            flush(path)
        if not self.output.exists():
            os.rename(self.partial, self.output)
        elif not _exchange(self.partial, self.output):
            os.rename(self.output, self._older)
            os.rename(self.partial, self.output)
        flush(self.partial.parent)

    def _remove_leftovers(self, kept: Path | None) -> bool:
        """Removes the older folder and ``partial``; returns True if ``partial`` stays, with only the folder of ``kept``."""
        remove(self._older)
        if kept is None or not is_regular(self.partial / kept, self.partial.parent):
            remove(self.partial)
            return False
        for path in self.partial.iterdir():
            if path.name != kept.parts[0]:
                remove(path)
        return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths in one step; returns False if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))
