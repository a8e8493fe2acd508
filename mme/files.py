"""Opens files safely, replaces them atomically, locks and hashes them.

A run, a checkpoint or a data set may be damaged or come from a stranger. So only regular files are read, because a pipe or a
device could block forever. A function with a ``root``, the stranger's folder, follows no symbolic link below it, so no file or
folder there can stand for something outside. Links on the way to ``root`` are followed, because the user chose that path. Without
a ``root`` the whole path is the user's own, and links are followed.

Files are published atomically: they are written under a name that can't be guessed, made durable and renamed. Their mode is 0666
minus the umask.

Locks do not use ``filelock``, which opens the lock file by its path and so follows links on the way to it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

PARTIAL = ".partial-"  # prefix of the names of files that are being written
MAX_TEXT_BYTES = 1 << 28  # a larger JSON or YAML file can't describe a run, a checkpoint or a data set
HASH_BLOCK_BYTES = 1 << 26  # size of the blocks of a large file that threads hash
HASH_THREADS = min(8, len(os.sched_getaffinity(0)))
VISIBLE_WITHIN_S = 30.0  # a file server may take this long to show a new file to another node
_BLOCK_BYTES = 1 << 20
# Without O_NONBLOCK, opening a pipe would wait for its other end. The flag has no effect on a regular file.
_ALWAYS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_to_read(path: Path, root: Path | None = None) -> BinaryIO:
    """Opens a regular file.

    Raises:
        OSError: it is missing or not a regular file, or there is a link on the way below ``root``.
    """
    return os.fdopen(_open_regular(path, os.O_RDONLY, root), "rb")


def read_text(path: Path, root: Path | None = None, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Reads a UTF-8 file.

    Raises:
        OSError: see `open_to_read`; or the file is larger than ``max_bytes``.
        UnicodeDecodeError: the file is not UTF-8.
    """
    with open_to_read(path, root) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return data.decode()


def read_json(path: Path, root: Path | None = None) -> Any:
    """Reads a JSON file.

    Raises:
        OSError: see `read_text`.
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(read_text(path, root), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def open_to_append(path: Path, root: Path) -> TextIO:
    """Opens a text file to append lines, each of which is written immediately; creates the file if it is missing.

    Raises:
        OSError: see `open_to_read`.
    """
    descriptor = _open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, root)
    return os.fdopen(descriptor, "a", buffering=1, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing(path: Path, root: Path | None = None) -> Iterator[Path]:
    """Yields the path of a new, empty file that replaces ``path`` durably at the end, but not after an exception.

    The body may also replace that file by another one, as libraries do that write whole files themselves.

    Raises:
        OSError: see `open_to_read`.
    """
    # The name keeps the suffix, because some libraries choose the format by it.
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}-{path.name[-200:]}")
    try:
        with _folder(path.parent, root) as folder:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _ALWAYS, 0o666)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            yield partial
            partial.chmod(mode)
            flush(partial)
            os.replace(partial, path)
            flush(Path("."), folder)
    except OSError as error:
        if error.strerror is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str, root: Path | None = None) -> None:
    """Writes a UTF-8 text file atomically.

    Raises:
        OSError: it can't be written; ``path`` is unchanged.
    """
    with replacing(path, root) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(path: Path, root: Path) -> None:
    """Creates ``path`` and the missing folders of ``root`` and between them.

    Raises:
        OSError: a folder can't be created, or there is a link or file in its place below ``root``.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _folder(path, root, make=True):
        pass


def require_folder(path: Path, root: Path) -> bool:
    """Whether ``path``, a folder below ``root``, exists.

    Raises:
        OSError: there is a link or a file in its place or on the way to it.
    """
    try:
        with _folder(path, root):
            return True
    except FileNotFoundError:
        return False


def is_regular(path: Path, root: Path) -> bool:
    """Whether ``path`` is a readable regular file without a link on the way below ``root``."""
    try:
        open_to_read(path, root).close()
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """Removes a file, a link (not its target) or a folder with its content; what can't be removed stays."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def flush(path: Path, folder: int | None = None) -> None:
    """Makes the content of a file, or the names in a folder, durable; ``path`` is relative to the descriptor ``folder``."""
    descriptor = os.open(path, os.O_RDONLY | _ALWAYS, dir_fd=folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, root: Path | None = None) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: see `open_to_read`.
    """
    digest = hashlib.sha256()
    with open_to_read(path, root) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_blocks(path: Path, root: Path | None = None, block_bytes: int = HASH_BLOCK_BYTES) -> str:
    """SHA-256 of the concatenated SHA-256 digests of a file's blocks, which threads read and hash in parallel.

    Raises:
        OSError: see `open_to_read`.
    """
    with open_to_read(path, root) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size

        def block_sum(start: int) -> bytes:
            digest, end = hashlib.sha256(), min(start + block_bytes, size)
            for place in range(start, end, _BLOCK_BYTES):
                digest.update(os.pread(descriptor, min(_BLOCK_BYTES, end - place), place))
            return digest.digest()

        with ThreadPoolExecutor(HASH_THREADS) as threads:
            return hashlib.sha256(b"".join(threads.map(block_sum, range(0, size, block_bytes)))).hexdigest()


def take_lock(path: Path, *, wait: bool = False) -> int:
    """Locks a file, which is created if it is missing; the kernel releases the lock when this process dies.

    Returns:
        The descriptor that `release_lock` takes.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is not set.
        OSError: see `open_to_read`; or the file system has no locks.
    """
    while True:
        descriptor = _open_regular(path, os.O_RDWR | os.O_CREAT, path.parent)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # If the last holder removed the file after it was opened here, this lock protects nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def release_lock(path: Path, descriptor: int) -> None:
    """Removes the file and releases the lock."""
    path.unlink(missing_ok=True)
    os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it. Raises OSError, see `take_lock`."""
    descriptor = take_lock(path, wait=True)
    try:
        yield
    finally:
        release_lock(path, descriptor)


def _open_regular(path: Path, flags: int, root: Path | None) -> int:
    if root is None:
        descriptor = os.open(path, flags | _ALWAYS, 0o666)
    else:
        with _folder(path.parent, root) as folder, _link_named(path):
            descriptor = os.open(path.name, flags | os.O_NOFOLLOW | _ALWAYS, 0o666, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


@contextmanager
def _folder(path: Path, root: Path | None, make: bool = False) -> Iterator[int]:
    """Opens a folder without following a link below ``root`` and yields its descriptor."""
    descriptor = os.open(path if root is None else root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        reached = root or path
        for name in () if root is None else path.relative_to(root).parts:
            reached = reached / name
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            with _link_named(reached):
                below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _link_named(path: Path) -> Iterator[None]:
    """Adds the path to errors, and names a link as such where the system says 'too many levels' or 'not a directory'."""
    if path.name == "..":
        raise OSError(errno.EINVAL, "leads out of its folder", str(path))
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed here", str(path)) from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
