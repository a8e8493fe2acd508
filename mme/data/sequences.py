"""The prepared data set, how each protocol cuts it, and the loaders that turn it into jagged batches.

A prepared data set is a folder that `mme prepare` writes:

    dataset.json    name, num_users, num_items, num_events, sort_rule, parts: [{file, users, events}], …
    part-00000.parquet …  one row a user: user_id (raw), item_ids (list of item indices), timestamps (list of seconds,
                    never falling)
    items.parquet   one row an item: item_index (from 0, without a gap), item_id (raw), count (events)

Legend: B sequences, N max_seq_len, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mme.data.balance import deal, sequence_cost
from mme.data.batch import EvaluationBatch, SequenceBatch
from mme.data.layout import INFO_FILE, ITEMS_FILE
from mme.data.prefetch import prefetch
from mme.errors import UserError

IntArray = NDArray[np.int64]

SPLITS = {
    "leave_one_out": ["test"],
    "leave_two_out": ["valid", "test"],
    "global_time": ["valid", "test"],
}


@dataclass(frozen=True)
class _Cut:
    """A protocol's positions in the flat events, one entry a user; -1: the user has no target of that split."""

    train_end: IntArray
    targets: dict[str, IntArray]


class PreparedDataset:
    """All sequences in memory, 12 bytes an event.

    Attributes:
        info: what dataset.json holds.
        items: (num_events,) int32 item indices, user after user, oldest first.
        timestamps: (num_events,) int64 seconds, never falling within a user.
        user_offsets: (num_users + 1,) int64, the events of user row u are user_offsets[u] to user_offsets[u + 1].
    """

    def __init__(
        self, folder: Path, info: dict[str, Any], items: NDArray[np.int32], timestamps: IntArray, user_offsets: IntArray
    ) -> None:
        self.folder, self.info = folder, info
        self.items, self.timestamps, self.user_offsets = items, timestamps, user_offsets
        self._cut = lru_cache(maxsize=4)(self._compute_cut)

    @classmethod
    def open(cls, path: str | Path) -> PreparedDataset:
        """Reads and checks a folder written by `mme prepare`.

        Raises:
            UserError: the folder, dataset.json or a part is missing, damaged or not what dataset.json says, an item is
                out of range, a timestamp falls or a value is null; the message names the file and row (from 0).
        """
        folder = Path(path)
        info = _read_info(folder)
        parts = [_read_part(folder / part["file"], part, info["num_items"]) for part in info["parts"]]
        lengths = np.concatenate([np.zeros(1, np.int64), *(part[0] for part in parts)])
        items = np.concatenate([np.zeros(0, np.int32), *(part[1] for part in parts)])
        timestamps = np.concatenate([np.zeros(0, np.int64), *(part[2] for part in parts)])
        for key, found in (("num_users", lengths.size - 1), ("num_events", items.size)):
            if info[key] != found:
                raise UserError(f"{folder / INFO_FILE}: {key} is {info[key]}, its parts hold {found}")
        return cls(folder, info, items, timestamps, np.cumsum(lengths))

    @property
    def num_items(self) -> int:
        return self.info["num_items"]

    @property
    def num_users(self) -> int:
        return self.user_offsets.size - 1

    @property
    def num_events(self) -> int:
        return self.items.size

    def splits(self, protocol: str) -> list[str]:
        """The splits that have targets, besides training."""
        return SPLITS[protocol]

    def train_ends(self, protocol: str, fraction: float) -> IntArray:
        """(num_users,) where each user's training events end (excluded), in the flat events."""
        return self._cut(protocol, fraction).train_end

    def targets(self, protocol: str, split: str, fraction: float) -> tuple[IntArray, IntArray]:
        """User rows that have a target in ``split``, and the target's position in the flat events."""
        position = self._cut(protocol, fraction).targets[split]
        rows = np.flatnonzero(position >= 0)
        return rows, position[rows]

    def training_counts(self, protocol: str, fraction: float) -> Tensor:
        """(num_items,) int64, how often each item occurs in the training events."""
        position = np.arange(self.num_events)
        in_training = position < np.repeat(self.train_ends(protocol, fraction), np.diff(self.user_offsets))
        return torch.from_numpy(np.bincount(self.items[in_training], minlength=self.num_items).astype(np.int64))

    def targets_sha256(self, protocol: str, split: str, fraction: float) -> str:
        """SHA-256 of the lines "user_id<TAB>item_id<LF>" in raw ids, UTF-8, in the order of the users' rows.

        Raw ids make it the same for any numbering of the items, so that results of different programs compare.
        """
        rows, positions = self.targets(protocol, split, fraction)
        users = pa.concat_arrays(
            [
                pq.read_table(self.folder / part["file"], columns=["user_id"])["user_id"].combine_chunks()
                for part in self.info["parts"]
            ]
        )
        table = pq.read_table(self.folder / ITEMS_FILE, columns=["item_index", "item_id"]).sort_by("item_index")
        raw_items = table["item_id"].take(pa.array(self.items[positions]))
        lines = pc.binary_join_element_wise(
            users.take(pa.array(rows)).cast(pa.string()), raw_items.combine_chunks().cast(pa.string()), "\t"
        )
        return hashlib.sha256("".join(f"{line}\n" for line in lines.to_pylist()).encode()).hexdigest()

    def _compute_cut(self, protocol: str, fraction: float) -> _Cut:
        begin, end = self.user_offsets[:-1], self.user_offsets[1:]
        length = end - begin
        if protocol == "leave_one_out":
            return _Cut(np.maximum(begin, end - 1), {"test": np.where(length >= 2, end - 1, -1)})
        if protocol == "leave_two_out":
            long_enough = length >= 3  # the same users are validated and tested
            targets = {"valid": np.where(long_enough, end - 2, -1), "test": np.where(long_enough, end - 1, -1)}
            return _Cut(np.maximum(begin, end - 2), targets)
        if self.num_events == 0:
            return _Cut(begin, {"valid": np.full_like(begin, -1), "test": np.full_like(begin, -1)})
        place = min(int(self.num_events * (1 - fraction)), self.num_events - 1)
        cut_off = np.partition(self.timestamps, place)[place]
        older = np.concatenate([[0], np.cumsum(self.timestamps < cut_off)])
        num_older = older[end] - older[begin]
        first_newer = begin + num_older
        return _Cut(
            np.where(num_older >= 2, first_newer - 1, first_newer),
            {
                "valid": np.where(num_older >= 2, first_newer - 1, -1),
                "test": np.where((num_older >= 1) & (first_newer < end), first_newer, -1),
            },
        )


class TrainLoader:
    """Batches of one rank; every sequence exactly once an epoch.

    A user with n ≥ 2 training events gives one sequence: the newest min(n - 1, N) tokens, each with the item that
    follows. The order of an epoch is a permutation seeded by (seed, epoch), the same for any number of processes. A
    global batch is the next ``batch_size`` × ``world_size`` sequences, or as many as fit ``tokens_per_batch`` ×
    ``world_size`` tokens; its sequences are dealt over the ranks so that the cost is even. Every rank has the same
    number of batches; in the last one of an epoch a rank may have no sequence.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        protocol: str,
        *,
        max_seq_len: int,
        batch_size: int,
        tokens_per_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        global_time_test_fraction: float = 0.1,
        attention_equals_rest_at: int = 528,
    ) -> None:
        self.dataset, self.attention_equals_rest_at = dataset, attention_equals_rest_at
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        train_end = dataset.train_ends(protocol, global_time_test_fraction)
        length = train_end - dataset.user_offsets[:-1]
        self.user_rows = np.flatnonzero(length >= 2)
        if self.user_rows.size == 0:
            raise UserError(f"{dataset.folder}: no user has two training events under data.protocol {protocol}")
        self.lengths = np.minimum(length[self.user_rows] - 1, max_seq_len)
        self.starts = train_end[self.user_rows] - 1 - self.lengths
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)

    def num_batches(self, epoch: int) -> int:
        return self._epoch(epoch)[1].size - 1

    def batches(self, epoch: int, start: int = 0) -> Iterator[SequenceBatch]:
        """The batches of an epoch from number ``start`` on, assembled ahead in one background thread."""
        return prefetch(self.batch(epoch, index) for index in range(start, self.num_batches(epoch)))

    def batch(self, epoch: int, index: int) -> SequenceBatch:
        """This rank's sequences of one global batch."""
        order, bounds = self._epoch(epoch)
        chosen = order[bounds[index] : bounds[index + 1]]
        costs = sequence_cost(self.lengths[chosen], self.attention_equals_rest_at)
        chosen = chosen[deal(costs, self.world_size) == self.rank]
        return _assemble(self.dataset, self.user_rows[chosen], self.starts[chosen], self.lengths[chosen])

    def _compute_epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The order of the sequences, and where each global batch begins in it, with the end of the last."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.user_rows.size)
        if self.tokens_per_batch is None:
            bounds = np.arange(0, order.size, self.batch_size * self.world_size)
            return order, np.append(bounds, order.size)
        tokens = np.cumsum(self.lengths[order])
        begins, used = [0], 0
        while begins[-1] < order.size:
            fits = int(np.searchsorted(tokens, used + self.tokens_per_batch * self.world_size, side="right"))
            begins.append(max(fits, begins[-1] + 1))
            used = int(tokens[begins[-1] - 1])
        return order, np.array(begins)


class EvaluationLoader:
    """Batches of one rank for one split: each user with a target once, in the order of the users' rows.

    Every rank has the same number of batches; a rank may have no history in the last one.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        protocol: str,
        split: str,
        *,
        max_seq_len: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        global_time_test_fraction: float = 0.1,
    ) -> None:
        self.dataset = dataset
        self.max_seq_len, self.batch_size = max_seq_len, batch_size
        self.rank, self.world_size = rank, world_size
        self.user_rows, self.positions = dataset.targets(protocol, split, global_time_test_fraction)

    def num_batches(self) -> int:
        return -(-self.user_rows.size // (self.batch_size * self.world_size))

    def batches(self) -> Iterator[EvaluationBatch]:
        return prefetch(self.batch(index) for index in range(self.num_batches()))

    def batch(self, index: int) -> EvaluationBatch:
        size = self.batch_size * self.world_size
        chosen = slice(index * size + self.rank, (index + 1) * size, self.world_size)
        rows, positions = self.user_rows[chosen], self.positions[chosen]
        begins = self.dataset.user_offsets[rows]
        lengths = np.minimum(positions - begins, self.max_seq_len)
        seen, seen_offsets = _gather_ranges(begins, positions - begins)
        return EvaluationBatch(
            sequences=_assemble(self.dataset, rows, positions - lengths, lengths),
            targets=_int64(self.dataset.items[positions]),
            seen_ids=_int64(self.dataset.items[seen]),
            seen_offsets=_int64(seen_offsets),
        )


def _assemble(dataset: PreparedDataset, rows: IntArray, starts: IntArray, lengths: IntArray) -> SequenceBatch:
    """Sequences of ``lengths`` tokens from the flat events at ``starts``, each with the event that follows."""
    events, _ = _gather_ranges(starts, lengths + 1)
    tokens, seq_offsets = _gather_ranges(starts, lengths)
    return SequenceBatch(
        item_ids=_int64(dataset.items[tokens]),
        seq_offsets=_int64(seq_offsets),
        timestamps=_int64(dataset.timestamps[events]),
        target_ids=_int64(dataset.items[tokens + 1]),
        user_rows=_int64(rows),
    )


def _gather_ranges(starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """The numbers start … start + length - 1 of each range one after another, and the ranges' offsets in them."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets


def _int64(values: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(values.astype(np.int64))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected a training set, made by `mme prepare`")
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: expected a training set's folder, made by `mme prepare`") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run `mme prepare` again") from error
    for key, kind in {
        "name": str, "num_users": int, "num_items": int, "num_events": int, "sort_rule": str, "parts": list
    }.items():  # fmt: skip
        if not isinstance(info, dict) or not isinstance(info.get(key), kind):
            raise UserError(f"{path}: no {key} ({kind.__name__}); run `mme prepare` again")
    if not (folder / ITEMS_FILE).is_file():
        raise UserError(f"{folder / ITEMS_FILE}: no such file: expected the item ids; run `mme prepare` again")
    return info


def _read_part(path: Path, part: dict[str, Any], num_items: int) -> tuple[IntArray, NDArray[np.int32], IntArray]:
    """Lengths, item indices and timestamps of one part, checked."""
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, though {INFO_FILE} names it") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file, perhaps truncated ({reason})") from error
    if table.num_rows != part["users"]:
        raise UserError(f"{path}: {table.num_rows} rows, {INFO_FILE} says {part['users']}")
    columns = {}
    for name in ("item_ids", "timestamps"):
        if name not in table.column_names:
            raise UserError(f"{path}: no column {name!r} (found: {', '.join(table.column_names)})")
        kind = table.schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            raise UserError(f"{path}: column {name!r} holds {kind}, expected list<int64>")
        columns[name] = table[name].cast(pa.large_list(pa.int64())).combine_chunks()
    return _check_part(path, columns["item_ids"], columns["timestamps"], num_items)


def _check_part(
    path: Path, items: pa.LargeListArray, times: pa.LargeListArray, num_items: int
) -> tuple[IntArray, NDArray[np.int32], IntArray]:
    for name, column in (("item_ids", items), ("timestamps", times)):
        if column.null_count:
            raise UserError(f"{path}: row {pc.index(pc.is_null(column), True)}: {name} is null, expected a list")
    lengths = np.asarray(pc.list_value_length(items), dtype=np.int64)
    unequal = np.flatnonzero(lengths != np.asarray(pc.list_value_length(times)))
    if unequal.size:
        raise UserError(f"{path}: row {unequal[0]}: not as many timestamps as item_ids")
    row_of_event = np.repeat(np.arange(lengths.size), lengths)
    for name, column in (("item_ids", items), ("timestamps", times)):
        values = column.flatten()
        if values.null_count:
            row = row_of_event[pc.index(pc.is_null(values), True).as_py()]
            raise UserError(f"{path}: row {row}: {name} has a null, expected an integer for every event")
    item_array, time_array = np.asarray(items.flatten()), np.asarray(times.flatten())
    wrong = np.flatnonzero((item_array < 0) | (item_array >= num_items))
    if wrong.size:
        row, item = row_of_event[wrong[0]], item_array[wrong[0]]
        raise UserError(f"{path}: row {row}: item index {item}, expected 0 to {num_items - 1}")
    falls = np.flatnonzero((np.diff(time_array) < 0) & (np.diff(row_of_event) == 0))
    if falls.size:
        before, after = time_array[falls[0]], time_array[falls[0] + 1]
        raise UserError(f"{path}: row {row_of_event[falls[0]]}: timestamp {after} follows {before}, expected no fall")
    return lengths, item_array.astype(np.int32), time_array
