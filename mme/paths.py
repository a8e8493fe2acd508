"""Paths that people give: refused in one line where nothing can be read from or written to them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from mme.errors import UserError

# `Path` makes s3:/bucket of s3://bucket.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def refuse_scheme(path: str, key: str = "") -> None:
    """Raises UserError for a URL such as ``s3://bucket/folder``; ``key``: the option or key that it comes from."""
    if _SCHEME.match(path):
        raise UserError(
            f"{key}: "
            * bool(key)
            + f"{path}: {path.partition(':')[0]}:// is not supported: expected a path in a mounted file "
            "system"
        )


def local_path(path: str | Path, key: str = "") -> Path:
    """``path``, which can name a place in a file system; ``key``: the option or key that it comes from.

    Raises:
        UserError: it is a URL, has a control character or is too long.
    """
    text = str(path)
    where = f"{key}: " if key else ""
    refuse_scheme(text, key)
    if _CONTROL_CHARACTER.search(text):
        raise UserError(f"{where}{text!r}: expected a path without control characters")
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # whoever reads or writes it says so
    except OSError as error:
        raise UserError(f"{where}{text[:100]}: {error.strerror}") from error
    return Path(path)


def regular_file(path: Path, expected: str) -> Path:
    """``path``, which is a file that can be read from its beginning as often as needed; ``expected``: what it should hold.

    Raises:
        UserError: there is none, or it is a folder, a pipe, a device or a socket.
    """
    local_path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder: expected {expected}")
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise UserError(f"{path}: is {kind}: expected a regular file, which can be read more than once")
    return path
