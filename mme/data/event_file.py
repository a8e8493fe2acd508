"""All events of a training set in one flat file, from which any sequence is a single read.

Parquet compresses row groups, so reading one sequence would decode a whole group. The first job that opens a set therefore
writes its events to a flat file, with 16 bytes per event and 4 per feature, and later reads fetch only the bytes they need.
A process keeps only the events that it is reading in memory. All processes of a machine share the kernel's page cache.

    SHA.events      num_events records (item int32, timestamp int64, each feature int32, check uint32), ordered by user, oldest
                    first
                    num_users + 1 int64: the offset of each user's first event, and the end
                    int64: the CRC-32 of the offsets

An event's check is a hash of its values and its place in the file. Each read verifies it, so damage is found without a pass
over the file when it is opened.

SHA is the hash of dataset.json and of the parts' names, sizes and modification times. A changed set gets a new file, and the
old one is removed. The file is published atomically; concurrent readers wait for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mme.data.layout import CACHE_FOLDER, INFO_FILE
from mme.data.parts import IntArray, feature_limits, limits, read_part
from mme.data.ranges import concatenated
from mme.errors import UserError, print_line
from mme.files import PARTIAL, locked, make_folder, open_to_read, read_text, replacing

CHECK = "check"  # the column of the checks; no feature has a name without a prefix
PRIME, SEED = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, so that a product loses no bit
MOST_THREADS = 4  # threads that write parts
EVENTS_AT_ONCE = 1 << 18  # events per read of a pass over all events
NOTED_EVENTS = 10_000_000  # from this size on, writing the file takes seconds and is announced

Records = NDArray[np.void]


class ReadError(Exception):
    """The flat file is damaged or unreadable. It is removed, and the next start writes it again."""


class EventFile:
    """A complete file, open for reading; any thread may read.

    Attributes:
        user_offsets: (num_users + 1,) int64, the events of user row u are user_offsets[u] to user_offsets[u + 1].
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        num_users, num_events = info["num_users"], info["num_events"]
        self.path, self.num_events = path, num_events
        self._record, self._limits = record_of(info), {"item": info["num_items"], **feature_limits(info)}
        self._file = open_to_read(path, path.parent)
        self.user_offsets: IntArray = np.empty(num_users + 1, np.int64)
        offsets = self.user_offsets.view(np.uint8).data
        self._fill(offsets, num_events * self._record.itemsize)
        crc = np.empty(1, np.int64)
        self._fill(crc.view(np.uint8).data, num_events * self._record.itemsize + len(offsets))
        if crc[0] != zlib.crc32(offsets):
            raise self._error("the checksum of the users' offsets differs")
        if self.user_offsets[0] or self.user_offsets[-1] != num_events or (np.diff(self.user_offsets) < 0).any():
            raise self._error("the users' offsets do not rise from 0 to the number of events")

    def read(self, starts: IntArray, lengths: IntArray) -> Records:
        """The events ``starts[i]`` … ``starts[i] + lengths[i] - 1`` of each range i, concatenated.

        Raises:
            ReadError: the file is damaged.
        """
        records = np.empty(int(lengths.sum()), self._record)
        view = records.view(np.uint8).data
        ranges = (np.stack([starts, lengths], 1) * self._record.itemsize).tolist()
        for start, size in ranges:
            # The disk fetches all ranges concurrently: with a cold cache this gives several times as many tokens per second.
            os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        place = 0
        for start, size in ranges:
            self._fill(view[place : place + size], start)
            place += size
        for name, limit in self._limits.items():
            indices = records[name]
            if indices.size and not (indices.min() >= 0 and indices.max() < limit):
                raise self._error(f"contains an {name} index outside 0 to {limit - 1}")
        if (records[CHECK] != checks(records, concatenated(starts, lengths))).any():
            raise self._error("the check of an event differs")
        return records

    def scan(self) -> Iterator[tuple[int, int, Records]]:
        """Yields all events in order as (first user row, exclusive last one, events), about `EVENTS_AT_ONCE` at a time."""
        first, num_users = 0, self.user_offsets.size - 1
        while first < num_users:
            begin = self.user_offsets[first]
            last = int(np.searchsorted(self.user_offsets, begin + EVENTS_AT_ONCE, side="right")) - 1
            last = min(max(last, first + 1), num_users)
            yield first, last, self.read(np.array([begin]), np.array([self.user_offsets[last] - begin]))
            first = last

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            try:
                count = os.preadv(self._file.fileno(), [buffer], offset)
            except OSError as error:
                raise self._error(error.strerror or "cannot be read") from error
            if not count:
                raise self._error(f"ends before byte {offset + len(buffer)}")
            buffer, offset = buffer[count:], offset + count

    def _error(self, what: str) -> ReadError:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            return ReadError(
                f"{self.path}: damaged: {what}; it cannot be removed ({error.strerror}): remove it, then start again"
            )
        return ReadError(f"{self.path}: damaged: {what}; it has been removed, and the next start writes it again")


def record_of(info: dict[str, Any]) -> np.dtype[np.void]:
    """The record of one event: item, timestamp, features named as in the parts, and check."""
    features = [(name, "<i4") for name in feature_limits(info)]
    return np.dtype([("item", "<i4"), ("timestamp", "<i8"), *features, (CHECK, "<u4")])


def checks(records: Records, places: IntArray) -> NDArray[np.uint32]:
    """A hash of each record's values and of its place in the file, (n,); any one changed value changes the 64-bit product."""
    mixed = places.astype(np.uint64) * PRIME ^ SEED
    for name in records.dtype.names or ():
        if name != CHECK:
            mixed = (mixed ^ records[name].astype(np.uint64)) * PRIME
    return (mixed >> np.uint64(32)).astype(np.uint32) ^ mixed.astype(np.uint32)


def open_event_file(folder: Path, info: dict[str, Any], cache_dir: Path | None = None) -> EventFile:
    """Opens the flat file of the set in ``folder``, and writes it first if it does not exist or the set has changed.

    Args:
        info: the content of the set's dataset.json.
        cache_dir: the folder of the flat file; None: the set's folder.

    Raises:
        UserError: a part is missing, damaged or does not match dataset.json, or the file cannot be written.
    """
    cache = folder / CACHE_FOLDER if cache_dir is None else cache_dir
    # Several sets may share a folder, so the name says which set a file belongs to.
    prefix = "" if cache_dir is None else f"{folder.name}-{_sha256(os.path.abspath(folder).encode())[:8]}-"
    root = folder if cache_dir is None else cache_dir
    path = cache / f"{prefix}{_identity(folder, info)}.events"
    num_events, num_users = info["num_events"], info["num_users"]
    size = num_events * record_of(info).itemsize + (num_users + 2) * 8
    if not _is_whole(path, size):
        with _writable(cache, root, size), locked(cache / f"{prefix}lock"):
            if not _is_whole(path, size):
                for older in [*cache.glob(f"{prefix}*.events*"), *cache.glob(f"{PARTIAL}*-{prefix}*.events")]:
                    older.unlink(missing_ok=True)
                _write(folder, info, path, root)
    return EventFile(path, info)


def _identity(folder: Path, info: dict[str, Any]) -> str:
    parts = []
    for part in info["parts"]:
        try:
            status = (folder / part["file"]).stat()
        except OSError as error:
            raise UserError(f"{folder / part['file']}: no such file, though {INFO_FILE} names it") from error
        parts.append((part["file"], status.st_size, status.st_mtime_ns))
    return _sha256(read_text(folder / INFO_FILE, folder).encode() + repr((record_of(info).descr, parts)).encode())[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_whole(path: Path, size: int) -> bool:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


@contextmanager
def _writable(cache: Path, root: Path, size: int) -> Iterator[None]:
    """Makes the folder; turns a disk error while ``size`` bytes are written to it into one line."""
    elsewhere = (
        "data.cache_dir=FOLDER, or --cache-dir of `mme evaluate`, puts the flat file of the events into another folder"
    )
    try:
        make_folder(cache, root)
        yield
    except OSError as error:
        need = f"{size / 1e9:.1f} GB are needed, {_free(cache) / 1e9:.1f} are free"
        raise UserError(f"{cache}: cannot be written: {error.strerror} ({need}); {elsewhere}") from error


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _write(folder: Path, info: dict[str, Any], path: Path, root: Path) -> None:
    """Writes all parts to their places, several at a time."""
    if info["num_events"] >= NOTED_EVENTS:
        print_line(f"{folder}: writing {info['num_events']:,} events to {path}, once")
    ends = np.cumsum([0] + [part["events"] for part in info["parts"]])
    with replacing(path, root) as unfinished, unfinished.open("wb", buffering=0) as file:
        with ThreadPoolExecutor(_threads()) as pool:
            lay_out = partial(_lay_out, folder, info, file.fileno())
            lengths = list(pool.map(lay_out, info["parts"], ends[:-1].tolist()))
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        trailer = np.append(offsets, zlib.crc32(offsets.data))
        _write_at(file.fileno(), trailer, int(ends[-1]) * record_of(info).itemsize)


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _lay_out(folder: Path, info: dict[str, Any], descriptor: int, part: dict[str, Any], first_event: int) -> IntArray:
    """Writes one part's events; returns the number of events of each of its users."""
    lengths = [np.zeros(0, np.int64)]
    record = record_of(info)
    place = first_event
    for piece in read_part(folder, part, limits(info)):
        records = np.empty(piece.items.size, record)
        records["item"], records["timestamp"] = piece.items, piece.timestamps
        for name, values in piece.features.items():
            records[name] = values
        records[CHECK] = checks(records, np.arange(place, place + records.size))
        _write_at(descriptor, records, place * record.itemsize)
        place += records.size
        lengths.append(piece.lengths)
    return np.concatenate(lengths)


def _write_at(descriptor: int, values: NDArray[Any], offset: int) -> None:
    data = values.view(np.uint8).data
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
