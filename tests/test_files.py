"""Reading and writing in a stranger's folder stays in it, and files are published atomically."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mme import files


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    folder = tmp_path / "stranger"
    folder.mkdir()
    return folder


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file outside the stranger's folder that must keep its content."""
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "canary"
    file.write_text("mine")
    return file


def append(path: Path, root: Path) -> None:
    with files.open_to_append(path, root) as file:
        file.write("theirs\n")


WRITES: dict[str, Callable[[Path, Path], Any]] = {
    "append": append,
    "replace": lambda path, root: files.write_text(path, "theirs", root),
    "lock": lambda path, root: files.release_lock(path, files.take_lock(path)),
    "read": lambda path, root: files.read_text(path, root),
    "hash": lambda path, root: files.sha256(path, root),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_link_in_place_of_a_file_is_not_followed(stranger: Path, canary: Path, name: str) -> None:
    link = stranger / "log.txt"
    link.symlink_to(canary)
    if name == "replace":  # the link itself is replaced
        WRITES[name](link, stranger)
        assert link.read_text() == "theirs" and not link.is_symlink()
    else:
        with pytest.raises(OSError, match="a symbolic link, which is not followed here") as refused:
            WRITES[name](link, stranger)
        assert refused.value.filename == str(link)
    assert canary.read_text() == "mine"


@pytest.mark.parametrize("name", ["append", "replace", "read", "hash"])
def test_a_link_in_place_of_a_folder_is_not_followed(stranger: Path, canary: Path, name: str) -> None:
    (stranger / "cache").symlink_to(canary.parent)
    with pytest.raises(OSError, match="a symbolic link, which is not followed here") as refused:
        WRITES[name](stranger / "cache" / "canary", stranger)
    assert refused.value.filename == str(stranger / "cache")
    with pytest.raises(OSError, match="a symbolic link"):
        files.make_folder(stranger / "cache" / "deeper", stranger)
    with pytest.raises(OSError, match="a symbolic link"):
        files.require_folder(stranger / "cache", stranger)
    assert canary.read_text() == "mine"
    assert [path.name for path in canary.parent.iterdir()] == ["canary"]


def test_no_name_leads_out_of_the_folder(stranger: Path, canary: Path) -> None:
    for path in (stranger / ".." / "mine" / "canary", stranger / ".."):
        with pytest.raises(OSError, match="leads out of its folder"):
            files.read_text(path, stranger)


def test_a_folder_reached_through_the_users_own_link_serves(tmp_path: Path, stranger: Path) -> None:
    (tmp_path / "runs").symlink_to(stranger)
    root = tmp_path / "runs" / "first"
    files.make_folder(root / "a" / "b", root)
    files.write_text(root / "a" / "b" / "file", "text", root)
    assert (stranger / "first" / "a" / "b" / "file").read_text() == "text"
    assert files.require_folder(root / "a", root) and not files.require_folder(root / "c", root)
    files.write_text(tmp_path / "runs" / "file", "text", tmp_path / "runs")
    assert (stranger / "file").read_text() == "text"
    own = tmp_path / "own"
    own.symlink_to(stranger / "first" / "a" / "b" / "file")
    assert files.read_text(own) == "text"


@pytest.mark.parametrize("name", ["append", "read", "hash", "lock"])
def test_a_pipe_or_a_device_is_refused_at_once(stranger: Path, name: str) -> None:
    os.mkfifo(stranger / "pipe")
    with pytest.raises(OSError):
        WRITES[name](stranger / "pipe", stranger)
    with pytest.raises(OSError, match="not a regular file"):
        files.read_text(Path("/dev/zero"))
    with pytest.raises(OSError, match="not a regular file"):
        files.read_text(stranger)


def test_a_file_has_the_mode_that_the_umask_leaves_whoever_writes_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = tmp_path / "file"
        with files.replacing(path) as partial:
            partial.unlink()  # safetensors replaces the file by another one with mode 0600
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
        append(tmp_path / "log", tmp_path)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "log")] == [0o640, 0o640]


def test_a_failed_write_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "before")
    with pytest.raises(RuntimeError), files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    with pytest.raises(OSError) as full, files.replacing(path) as partial:
        raise OSError(28, "No space left on device", str(partial))
    assert full.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_is_written_has_a_name_that_nobody_guesses(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with suppress(RuntimeError), files.replacing(tmp_path / "file") as partial:
            names.add(partial.name)
            raise RuntimeError
    assert len(names) == 3 and all(len(name) >= len(".partial--file") + 16 for name in names)


def test_texts_and_json_that_are_too_large_or_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x" * 101)
    assert files.read_text(path, max_bytes=101) == "x" * 101
    with pytest.raises(OSError, match="larger than 100 bytes"):
        files.read_text(path, max_bytes=100)
    for text in ("[" * 100_000, '{"a": NaN}', "{", "1" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError):
            files.read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(ValueError):
        files.read_json(path)


def test_a_lock_is_waited_for_and_released_by_death(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    hold = "import sys, time, pathlib; from mme.files import take_lock; take_lock(pathlib.Path(sys.argv[1]))"
    hold += "; print(1, flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(BlockingIOError):
            files.take_lock(path)
        ender = threading.Timer(0.3, holder.kill)
        ender.start()
        begun = time.monotonic()
        with files.locked(path):
            assert time.monotonic() - begun > 0.2
    assert not path.exists()


def test_the_sum_of_blocks_is_that_of_their_sums(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9_000  # two blocks and a part of one
    (tmp_path / "data").write_bytes(data)
    block_bytes = 1_000_000
    sums = [hashlib.sha256(data[start : start + block_bytes]).digest() for start in range(0, len(data), block_bytes)]
    found = files.sha256_of_blocks(tmp_path / "data", block_bytes=block_bytes)
    assert found == hashlib.sha256(b"".join(sums)).hexdigest() and len(sums) == 3
    (tmp_path / "empty").touch()
    assert files.sha256_of_blocks(tmp_path / "empty") == hashlib.sha256().hexdigest()
