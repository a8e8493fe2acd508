"""The flat file of a set's events: written once and atomically, matched to its set, with clear errors."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.data_loading import in_process, memory_of
from benchmarks.data_loading import write_set as write_large_set
from mme.config import DataConfig
from mme.data import event_file
from mme.data.dataset import PreparedDataset
from mme.data.event_file import ReadError, checks, record_of
from mme.data.loaders import TrainLoader, Worker
from mme.errors import UserError
from mme.prepare.writer import DatasetWriter

NUM_ITEMS = 50
ROOT = os.geteuid() == 0


def write_set(path: Path, seed: int, events_per_part: int = 300) -> list[tuple[list[int], list[int]]]:
    """A set in several parts, and the items and times of each user."""
    rng = np.random.default_rng(seed)
    histories = [(rng.integers(NUM_ITEMS, size=n), np.sort(rng.integers(10**6, size=n))) for n in range(1, 60)]
    with DatasetWriter(path, events_per_part) as writer:
        for user, (items, times) in enumerate(histories):
            writer.add(pa.array([user]), np.array([0, items.size]), items, times)
        writer.finish({"name": "t", "sort_rule": "stable"}, pa.array(range(NUM_ITEMS)), np.ones(NUM_ITEMS, int))
    return [(items.tolist(), times.tolist()) for items, times in histories]


def read_all(dataset: PreparedDataset) -> list[tuple[list[int], list[int]]]:
    events = dataset.read(dataset.user_offsets[:-1], np.diff(dataset.user_offsets))
    bounds = dataset.user_offsets[1:-1]
    return [(part["item"].tolist(), part["timestamp"].tolist()) for part in np.split(events, bounds)]


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.events*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", seed=1)
    return tmp_path / "set"


def test_holds_every_event_and_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = write_set(tmp_path / "set", seed=1)
    assert len(list((tmp_path / "set").glob("part-*"))) > 4
    assert read_all(PreparedDataset.open(tmp_path / "set")) == histories
    (file,) = event_files(tmp_path / "set")
    monkeypatch.setattr(event_file, "_write", None)  # must not be called again
    assert read_all(PreparedDataset.open(tmp_path / "set")) == histories
    assert event_files(tmp_path / "set") == [file]


def test_another_set_in_the_same_place_gets_its_own(folder: Path) -> None:
    """A set prepared again, and a set with a modified part, which is read and checked again."""
    running = PreparedDataset.open(folder)
    before, (older,) = read_all(running), event_files(folder)
    histories = write_set(folder, seed=2)
    assert read_all(PreparedDataset.open(folder)) == histories != before
    assert read_all(running) == before  # a running job keeps the older file open
    (file,) = event_files(folder)
    assert file != older
    part = folder / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9] + b"?" * 9)
    with pytest.raises(UserError, match=r"part-00001.parquet: not a readable Parquet file, perhaps truncated"):
        PreparedDataset.open(folder)


def test_sets_can_share_a_cache_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    histories = {name: write_set(tmp_path / name / "set", seed) for seed, name in enumerate("ab")}
    for _ in range(2):
        for name, expected in histories.items():
            assert read_all(PreparedDataset.open(tmp_path / name / "set", cache)) == expected
    assert len(event_files(cache)) == 2
    assert not event_files(tmp_path / "a") and not event_files(tmp_path / "b")
    histories["a"] = write_set(tmp_path / "a" / "set", 7)
    for name, expected in histories.items():
        assert read_all(PreparedDataset.open(tmp_path / name / "set", cache)) == expected
    assert len(event_files(cache)) == 2  # the older file of set a is gone


def test_two_concurrent_jobs_write_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, writing = [], event_file._write

    def slow(*arguments: Any) -> None:
        written.append(arguments)
        writing(*arguments)

    monkeypatch.setattr(event_file, "_write", slow)
    opened: list[PreparedDataset] = []
    threads = [threading.Thread(target=lambda: opened.append(PreparedDataset.open(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6 and len(written) == 1
    assert all(read_all(dataset) == read_all(opened[0]) for dataset in opened)


KILLED_WHILE_WRITING = """
import os, signal, sys
from benchmarks.data_loading import in_process, memory_of, write_set as write_large_set
from mme.data import event_file
from mme.data.dataset import PreparedDataset
write, calls = os.pwrite, []
def dies(*arguments):
    calls.append(arguments)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
os.pwrite = dies
PreparedDataset.open(sys.argv[1])
"""


def test_a_job_killed_while_writing_does_not_affect_the_next(tmp_path: Path) -> None:
    histories = write_set(tmp_path / "set", seed=1)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "set")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    (left,) = event_files(tmp_path / "set")
    assert left.name.startswith(".partial-")
    assert read_all(PreparedDataset.open(tmp_path / "set")) == histories
    (file,) = event_files(tmp_path / "set")
    assert file.suffix == ".events"


def test_no_space_is_one_line_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_file.os, "pwrite", no_space)
    message = (
        r"cannot be written: No space left on device \(0.0 GB are needed, [\d.]+ are free\); data.cache_dir=FOLDER"
    )
    with pytest.raises(UserError, match=message):
        PreparedDataset.open(folder)
    assert not event_files(folder)


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache: cannot be written: Not a directory"):
        PreparedDataset.open(folder, tmp_path / "file" / "cache")


@pytest.mark.skipif(ROOT, reason="root may write anywhere")
def test_a_read_only_set(folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o555)
    with pytest.raises(UserError, match=r"set/.cache: cannot be written: Permission denied"):
        PreparedDataset.open(folder)
    assert PreparedDataset.open(folder, tmp_path / "cache").num_users == 59


def loader(folder: Path, readers: int = 2) -> TrainLoader:
    data = DataConfig(protocol="leave_one_out", max_seq_len=10, batch_size=2, readers=readers)
    return TrainLoader(PreparedDataset.open(folder), data, Worker(0, 1, torch.device("cpu")))


def trained_on(folder: Path, opened: TrainLoader | None = None) -> int:
    """Sequences of one epoch."""
    number = 0
    for batch in (opened or loader(folder)).stream():
        number += batch.sequences.num_sequences
        if batch.is_last:
            break
    return number


def test_a_file_truncated_during_reading(folder: Path) -> None:
    """Gives one line and removes the file, so that the next start writes it again."""
    stream = loader(folder).stream()
    next(stream)
    (file,) = event_files(folder)
    os.truncate(file, 100)
    with pytest.raises(
        ReadError, match=r"\.events: damaged: ends before byte \d+; it has been removed, and the next start"
    ):
        list(stream)
    assert not event_files(folder)
    assert trained_on(folder) == 57


def test_a_file_removed_during_reading(folder: Path) -> None:
    """The job continues with the open file; the next start writes a new one."""
    running = loader(folder)
    shutil.rmtree(folder / event_file.CACHE_FOLDER)
    assert trained_on(folder, running) == 57
    assert trained_on(folder) == 57


def change(file: Path, offset: int, content: bytes) -> None:
    with file.open("r+b") as bytes_:
        bytes_.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        bytes_.write(content)


def test_an_invalid_item(folder: Path) -> None:
    record = np.zeros(1, record_of(PreparedDataset.open(folder).info))
    record["item"] = NUM_ITEMS
    record["check"] = checks(record, np.array([200]))
    (file,) = event_files(folder)
    change(file, 200 * record.itemsize, record.tobytes())
    with pytest.raises(ReadError, match=r"damaged: contains an item index outside 0 to 49"):
        list(loader(folder).stream())
    assert not event_files(folder)


@pytest.mark.parametrize("field", ["item", "timestamp", "check"])
def test_a_changed_event_is_found(folder: Path, field: str) -> None:
    """Each value is one that the set could have."""
    dataset = PreparedDataset.open(folder)
    record = dataset.read(np.array([200]), np.array([1])).copy()
    record[field] = record[field] - 1 if record[field] else 1
    (file,) = event_files(folder)
    change(file, 200 * record.itemsize, record.tobytes())
    with pytest.raises(ReadError, match=r"damaged: the check of an event differs"):
        list(loader(folder).stream())
    assert trained_on(folder) == 57


def test_events_in_another_order_are_found(folder: Path) -> None:
    dataset = PreparedDataset.open(folder)
    first = int(np.flatnonzero(np.diff(dataset.user_offsets) > 2)[0])
    records = dataset.read(dataset.user_offsets[first : first + 1], np.array([2]))
    (file,) = event_files(folder)
    change(file, int(dataset.user_offsets[first]) * records.itemsize, records[::-1].tobytes())
    with pytest.raises(ReadError, match=r"damaged: the check of an event differs"):
        list(loader(folder).stream())


def test_invalid_offsets(folder: Path) -> None:
    PreparedDataset.open(folder)
    (file,) = event_files(folder)
    change(file, -24, b"\xff" * 8)
    with pytest.raises(ReadError, match=r"damaged: the checksum of the users' offsets differs"):
        PreparedDataset.open(folder)
    assert PreparedDataset.open(folder).num_users == 59


def test_offsets_that_fall_are_refused_with_their_checksum(folder: Path) -> None:
    offsets = PreparedDataset.open(folder).user_offsets.copy()
    offsets[5] = 0
    (file,) = event_files(folder)
    change(file, -8 * (offsets.size + 1), np.append(offsets, zlib.crc32(offsets.data)).tobytes())
    with pytest.raises(ReadError, match=r"damaged: the users' offsets do not rise"):
        PreparedDataset.open(folder)


def test_a_bad_disk_is_named_with_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = loader(folder).stream()
    next(stream)

    def fails(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(event_file.os, "preadv", fails)
    with pytest.raises(ReadError, match=r"\.events: damaged: Input/output error"):
        list(stream)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_events(tmp_path: Path) -> None:
    """Eight million events take 96 MB in memory; each query may use at most a third of that."""
    write_large_set(tmp_path / "set", 8_000_000)
    figures = in_process(memory_of, tmp_path / "set")
    assert figures["flat_file_bytes"] > 96e6
    grown = {name: value["anonymous_mib"] for name, value in figures.items() if isinstance(value, dict)}
    del grown["first_open"]  # contains a bounded number of decoded row groups
    assert len(grown) == 4 and max(grown.values()) < 32, grown
