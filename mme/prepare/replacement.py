"""Puts a new folder in the place of an older one, whole or not at all, whenever the process is killed.

The new folder is filled beside the old one under another name, which is the same each time, so that the next run finds what
a killed one has left. In the end one system call exchanges the two (renameat2 with RENAME_EXCHANGE; two renames where the
file system has no exchange, and then the next run restores the older folder if the process died between them). A lock file,
held by flock and released by the kernel when its holder dies, tells a run in progress from what a dead one left behind.

Anybody may have put a link in place of the lock, the new folder or the older one: links are removed, never followed.
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
    """``partial`` takes the place of ``output`` by `commit`; left without it, nothing has changed.

    Raises:
        UserError: another process is writing ``output``, or the folder that holds it can't be written to.
    """

    def __init__(self, output: Path, kept: Path | None = None) -> None:
        """``kept``: a file in a folder of ``partial``; where it is there, that folder survives an interruption."""
        # The folder that a link of the user's leads to: exchanged with the link itself, the older set would stay.
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
        """Makes what is in ``partial`` durable, then ``partial`` and ``output`` one in a single step."""
        for path in [*self.partial.iterdir(), self.partial]:
            flush(path)
        if not self.output.exists():
            os.rename(self.partial, self.output)
        elif not _exchange(self.partial, self.output):
            os.rename(self.output, self._older)
            os.rename(self.partial, self.output)
        flush(self.partial.parent)

    def _remove_leftovers(self, kept: Path | None) -> bool:
        """Removes the older folder and ``partial``; True: ``partial`` stays, with the folder of ``kept`` alone."""
        remove(self._older)
        if kept is None or not is_regular(self.partial / kept, self.partial.parent):
            remove(self.partial)
            return False
        for path in self.partial.iterdir():
            if path.name != kept.parts[0]:
                remove(path)
        return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths in one step; False: the system has no such call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))
