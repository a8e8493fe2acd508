"""A prepared training set (layout: `mme.data.parts`): its events on demand, and its division by a `Split`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mme.data.description import content_sha256, read_info
from mme.data.event_file import EventFile, Records, open_event_file
from mme.data.features import feature_sizes
from mme.data.numbering import Extent, numbering_sha256, read_item_ids
from mme.data.parts import IntArray, check_files, read_user_ids
from mme.data.remote_set import local_folder
from mme.data.split import HeldOut, Split

TIME_BUCKETS = 1 << 16  # buckets of a pass that counts all times


class PreparedDataset:
    """A training set on disk. In memory are about 8 bytes per user and query, and the events being read.

    Attributes:
        info: the content of dataset.json.
        events: the flat file of the events.
        user_offsets: (num_users + 1,) int64, the events of user row u are user_offsets[u] to user_offsets[u + 1] of the
            flat events, which are ordered by user, oldest first.
    """

    def __init__(self, folder: Path, info: dict[str, Any], events: EventFile) -> None:
        self.folder, self.info, self.events = folder, info, events
        self.user_offsets = events.user_offsets
        # Each evaluation needs these results of passes over all events, which do not change.
        self._num_older = lru_cache(maxsize=1)(self._compute_num_older)
        self._training_counts = lru_cache(maxsize=2)(self._compute_training_counts)
        self._known_targets = lru_cache(maxsize=2)(self._compute_known_targets)
        self._targets_sha256 = lru_cache(maxsize=4)(self._compute_targets_sha256)

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None) -> PreparedDataset:
        """Opens a folder written by `mme prepare`, or a remote one (`mme.data.remote_set`). The first time, it reads and
        checks all events.

        Args:
            cache_dir: the folder of the flat file of the events (`mme.data.event_file`) and of copies of remote sets; None: the
                data set's folder and the user's cache folder.

        Raises:
            UserError: the folder, dataset.json or a part is missing, damaged or not what dataset.json says, an item is
                out of range, a timestamp decreases or a value is null; the message names the file and row (from 0).
        """
        folder = local_folder(path, cache_dir)
        info = read_info(folder)
        check_files(folder, info)
        return cls(folder, info, open_event_file(folder, info, None if cache_dir is None else Path(cache_dir)))

    @property
    def sha256(self) -> str:
        """SHA-256 of dataset.json, which contains the checksums of the raw input; independent of the folder's path."""
        return content_sha256(self.info)

    @property
    def num_items(self) -> int:
        return self.info["num_items"]

    @property
    def num_users(self) -> int:
        return self.info["num_users"]

    @property
    def num_events(self) -> int:
        return self.info["num_events"]

    def feature_sizes(self, names: Sequence[str]) -> dict[str, int]:
        """See `mme.data.features`; raises UserError if the set has no such column."""
        return feature_sizes(self.folder, self.info, names)

    def extent(self, features: Sequence[str]) -> Extent:
        """The whole numbering of items and of the named columns."""
        return Extent(self.num_items, self.feature_sizes(features))

    def numbering_sha256(self, features: Sequence[str]) -> str:
        """See `mme.data.numbering`."""
        return numbering_sha256(self.folder, self.info, features)

    @property
    def num_runs(self) -> int:
        """The number of runs of `mme prepare` that made the set, including those with --add-to."""
        return len(self.info.get("runs", []))

    def runs_sha256(self, count: int) -> str:
        """SHA-256 of the records of the first ``count`` of these runs in dataset.json; --add-to keeps them."""
        return hashlib.sha256(json.dumps(self.info.get("runs", [])[:count], sort_keys=True).encode()).hexdigest()

    def read(self, starts: IntArray, lengths: IntArray) -> Records:
        """The events (``item``, ``timestamp``, features) ``starts[i]`` … ``starts[i] + lengths[i] - 1`` of each range i.

        Raises:
            ReadError: the flat file has been damaged.
        """
        return self.events.read(starts, lengths)

    def train_ends(self, split: Split) -> IntArray:
        """(num_users,) the exclusive end of each user's training events in the flat events."""
        return split.train_ends(self.user_offsets, self._num_older)

    def targets(self, split: Split, part: HeldOut, num_items: int | None = None) -> tuple[IntArray, IntArray]:
        """User rows that have a target in ``part``, and the target's position in the flat events.

        Args:
            num_items: the number of items that a model knows of a set that has grown since, which are the first ones. Users
                whose target, or whose whole history, consists of other items are left out.
        """
        if num_items is None or num_items >= self.num_items:
            return split.targets(part, self.user_offsets, self._num_older)
        return self._known_targets(split, part, num_items)

    def training_counts(self, split: Split, items: range | None = None) -> Tensor:
        """(len(items),) int64, how often each of these items occurs in the training events; None: all items."""
        return self._training_counts(split, range(self.num_items) if items is None else items)

    def targets_sha256(self, split: Split, part: HeldOut, num_items: int | None = None) -> str:
        """SHA-256 of the lines "user_id<TAB>item_id<LF>" of `targets`: raw ids, UTF-8, in the order of the users' rows.

        Raw ids make the hash independent of how items are numbered, so that results of different programs can be compared.
        """
        if num_items is not None and num_items >= self.num_items:
            num_items = None  # so that a hash computed earlier is found
        return self._targets_sha256(split, part, num_items)

    def _compute_training_counts(self, split: Split, items: range) -> Tensor:
        counts = np.zeros(len(items), np.int64)
        train_ends = self.train_ends(split)
        for first, last, events in self.events.scan():
            begin = self.user_offsets[first]
            ends = np.repeat(train_ends[first:last] - begin, np.diff(self.user_offsets[first : last + 1]))
            found = events["item"][np.arange(events.size) < ends]
            np.add.at(counts, found[(found >= items.start) & (found < items.stop)] - items.start, 1)
        return torch.from_numpy(counts)

    def _compute_known_targets(self, split: Split, part: HeldOut, num_items: int) -> tuple[IntArray, IntArray]:
        rows, positions = self.targets(split, part)
        chosen = np.zeros(rows.size, bool)
        for first, last, events in self.events.scan():
            here = slice(*np.searchsorted(rows, [first, last]))
            begin = self.user_offsets[first]
            known = np.concatenate([[0], np.cumsum(events["item"] < num_items)])
            starts, targets = self.user_offsets[rows[here]] - begin, positions[here] - begin
            chosen[here] = (known[targets] > known[starts]) & (known[targets + 1] > known[targets])
        return rows[chosen], positions[chosen]

    def _compute_targets_sha256(self, split: Split, part: HeldOut, num_items: int | None) -> str:
        rows, positions = self.targets(split, part, num_items)
        raw_items = read_item_ids(self.folder)
        digest = hashlib.sha256()
        first = 0
        for file in self.info["parts"]:
            for user_ids in read_user_ids(self.folder, file):
                here = slice(*np.searchsorted(rows, [first, first + len(user_ids)]))
                items = self.read(positions[here], np.ones_like(positions[here]))["item"]
                lines = pc.binary_join_element_wise(
                    user_ids.take(pa.array(rows[here] - first)).cast(pa.string()),
                    raw_items.take(pa.array(items)).cast(pa.string()),
                    "\t",
                )
                digest.update("".join(f"{line}\n" for line in lines.to_pylist()).encode())
                first += len(user_ids)
        return digest.hexdigest()

    def _compute_num_older(self, fraction: float) -> IntArray:
        """(num_users,) the number of each user's events before the cut-off of `global_time`."""
        num_older = np.zeros(self.num_users, np.int64)
        cut_off = self._time_at(min(int(self.num_events * (1 - fraction)), self.num_events - 1))
        for first, last, events in self.events.scan():
            older = np.concatenate([[0], np.cumsum(events["timestamp"] < cut_off)])
            bounds = self.user_offsets[first : last + 1] - self.user_offsets[first]
            num_older[first:last] = np.diff(older[bounds])
        return num_older

    def _time_at(self, place: int) -> int:
        """The time at index ``place`` of all sorted times, found by splitting its bucket into buckets repeatedly."""
        lowest, highest = [], []
        for _, _, events in self.events.scan():
            if events.size:
                lowest.append(int(events["timestamp"].min()))
                highest.append(int(events["timestamp"].max()))
        low, high = min(lowest, default=0), max(highest, default=0)
        while low < high:
            width = -(-(high - low + 1) // TIME_BUCKETS)
            counts = np.zeros(TIME_BUCKETS, np.int64)
            for _, _, events in self.events.scan():
                times = events["timestamp"]
                inside = times[(times >= low) & (times <= high)]
                counts += np.bincount((inside - low) // width, minlength=TIME_BUCKETS)
            reached = np.cumsum(counts)
            bucket = int(np.searchsorted(reached, place, side="right"))
            place -= int(reached[bucket - 1]) if bucket else 0
            low, high = low + bucket * width, min(high, low + (bucket + 1) * width - 1)
        return low
