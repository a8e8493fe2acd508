"""Checks paths from users and rejects those that can't name a file or folder on this machine, in one line."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mme.errors import UserError
from mme.files import open_to_read

REMOTE_SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")  # of the stores that `mme.remote` opens
LONGEST_NAME, LONGEST_PATH = 255, 4095  # Linux's limits, in bytes
# `Path` turns s3://bucket into s3:/bucket.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


def remote_url(path: str | Path) -> str | None:
    """The URL that ``path`` is, with a scheme of `REMOTE_SCHEMES`; None for any other path.

    Raises:
        UserError: it has a control character.
    """
    scheme, separator, rest = str(path).partition(":/")
    if not separator or scheme not in REMOTE_SCHEMES:
        return None
    url = f"{scheme}://{rest.lstrip('/')}"
    if _CONTROL_CHARACTER.search(url):
        raise UserError(f"{url!r}: expected a URL without control characters")
    return url


def check_path(path: str, key: str = "") -> None:
    """Checks the text of a path; ``key`` is the option or key that it comes from.

    Raises:
        UserError: it is a URL such as ``s3://bucket/folder``, has a control character or is too long.
    """
    where = f"{key}: " if key else ""
    if _SCHEME.match(path):
        scheme, _, rest = path.partition(":")
        url = f"{scheme}://{rest.lstrip('/')}"
        raise UserError(f"{where}{url}: {scheme}:// is not supported: expected a path in a mounted file system")
    if _CONTROL_CHARACTER.search(path):
        raise UserError(f"{where}{path!r}: expected a path without control characters")
    data = os.fsencode(path)
    if len(data) > LONGEST_PATH or max(map(len, data.split(b"/"))) > LONGEST_NAME:
        raise UserError(
            f"{where}{path!r:.40}… is too long for a path: expected at most {LONGEST_PATH} bytes, and at most "
            f"{LONGEST_NAME} for each name in it"
        )


def local_path(path: str | Path, key: str = "") -> Path:
    """Returns ``path`` if the file system accepts it; ``key`` is the option or key that it comes from.

    Raises:
        UserError: see `check_path`; or the file system rejects it, for example because links form a loop.
    """
    check_path(str(path), key)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the code that reads or writes it reports this
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}" if key else f"{path}: {error.strerror}") from error
    return Path(path)


def regular_file(path: Path, expected: str) -> Path:
    """Returns ``path`` if it is a readable regular file; ``expected`` describes the expected content.

    Raises:
        UserError: it is missing or can't be opened, or is a folder, a pipe, a device or a socket.
    """
    local_path(path)
    try:
        open_to_read(path).close()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected {expected}") from error
    return path
