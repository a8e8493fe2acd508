"""The files that `mme prepare` reads, on this machine or in a remote store, behind the same few functions."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa

from mme.data.description import FileSum, file_sum
from mme.remote import RemoteFile

InputFile = Path | RemoteFile


def open_stream(path: InputFile) -> AbstractContextManager[pa.NativeFile]:
    """Opens a file to read it from its start, decompressed if its name says that it is compressed."""
    return path.open() if isinstance(path, RemoteFile) else pa.input_stream(str(path))


def open_random_access(path: InputFile) -> AbstractContextManager[pa.NativeFile]:
    """Opens a file as it is stored, to read any part of it."""
    return path.open(random_access=True) if isinstance(path, RemoteFile) else pa.OSFile(str(path))


def identity(path: InputFile) -> tuple[object, ...]:
    """What tells whether a file is still the same: its place, size, modification time and version."""
    if isinstance(path, RemoteFile):
        return (path.url, *path.version)
    status = path.stat()
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def input_sum(path: InputFile) -> FileSum:
    """The size and SHA-256 of a file; a remote object is read a second time for it."""
    if isinstance(path, RemoteFile):
        return {"bytes": path.version.size, "sha256": path.sha256()}
    return file_sum(path)
