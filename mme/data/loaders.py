"""The loaders that turn a training set into jagged batches, one rank's share of each global batch.

Legend: B sequences, N max_seq_len, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mme.config import USER_ID, DataConfig
from mme.data.balance import deal, sequence_cost
from mme.data.batch import EvaluationBatch, SequenceBatch
from mme.data.dataset import PreparedDataset
from mme.data.event_file import Records
from mme.data.features import NO_FEATURES, Features, parts_column
from mme.data.parts import IntArray
from mme.data.prefetch import prefetch
from mme.data.ranges import concatenated
from mme.data.split import HeldOut, Split
from mme.data.target_weights import TargetWeights
from mme.data.windows import Windows
from mme.errors import UserError


@dataclass(frozen=True)
class Worker:
    """One process of a job: its rank among ``size``, and the device that its batches are copied to."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class TrainBatch:
    """This rank's part of a global batch.

    Attributes:
        end: number of sequences of the epoch that all ranks have trained on after this batch.
        is_last: whether it is the last batch of its epoch.
    """

    epoch: int
    end: int
    is_last: bool
    sequences: SequenceBatch

    def to(self, device: torch.device) -> TrainBatch:
        return replace(self, sequences=self.sequences.to(device))

    def tensors(self) -> list[Tensor]:
        return self.sequences.tensors()


class TrainLoader:
    """Batches of one rank. Every sequence occurs exactly once per epoch.

    A user with n ≥ 2 training events gives one sequence, the newest min(n - 1, N) tokens, each with the item that
    follows; with `data.windows=sliding` a user may give several (`mme.data.windows`). The order of an epoch is a permutation
    seeded by (seed, epoch), the same for any number of processes and readers. A global batch is the next
    `data.batch_size` × processes sequences, or as many as fit `data.tokens_per_batch` × processes tokens. Its sequences
    are distributed among the ranks so that the cost is even. Every rank has the same number of batches; in the last batch
    of an epoch a rank may have no sequence.

    ``first`` in the methods is the number of sequences of the epoch that have been trained on. The remaining sequences do
    not depend on how many processes trained on them. `set_shares` keeps the global batches of another number of processes.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        data: DataConfig,
        worker: Worker,
        features: Features = NO_FEATURES,
        *,
        seed: int = 0,
        attention_equals_rest_at: int = 528,
        target_weights: TargetWeights | None = None,
    ) -> None:
        """``attention_equals_rest_at``: see `mme.data.balance`; ``target_weights``: None if all targets have the same weight."""
        self.target_weights = target_weights
        self.dataset, self.data, self.worker, self.features = dataset, data, worker, features
        self.seed, self.attention_equals_rest_at = seed, attention_equals_rest_at
        history_len = data.history_len(bool(features.users))
        stride = (data.window_stride or history_len) if data.windows == "sliding" else None
        train_ends = dataset.train_ends(Split.of(data))
        self.windows = Windows(dataset.user_offsets[:-1], train_ends, history_len, stride)
        if not len(self.windows):
            raise UserError(f"{dataset.folder}: no user has two training events under data.protocol {data.protocol}")
        self._order = lru_cache(maxsize=2)(self._compute_order)
        self._bounds = lru_cache(maxsize=2)(self._compute_bounds)
        self.set_shares(worker.size)

    def set_shares(self, shares: int) -> None:
        """Makes later global batches ``shares`` times the batch of a rank, instead of processes times."""
        self.shares = shares
        self._bounds.cache_clear()

    def num_batches(self, epoch: int, first: int = 0) -> int:
        return self.bounds(epoch, first).size - 1

    def stream(self, epoch: int = 0, first: int = 0) -> Generator[TrainBatch, None, None]:
        """Yields endless batches from sequence ``first`` of ``epoch`` on, which the readers prefetch."""
        places = (
            (number, begin, end)
            for number in itertools.count(epoch)
            for begin, end in itertools.pairwise(self.bounds(number, first if number == epoch else 0).tolist())
        )
        makers = (partial(self._train_batch, *place) for place in places)
        return prefetch(makers, self.data.readers, self.worker.device)

    def bounds(self, epoch: int, first: int = 0) -> IntArray:
        """The start of each global batch in the order of the epoch, followed by the end of the last."""
        return self._bounds(epoch, first)

    def batch(self, epoch: int, begin: int, end: int) -> SequenceBatch:
        """This rank's sequences of the global batch from ``begin`` to ``end`` in the order of the epoch."""
        chosen = self._order(epoch)[begin:end].astype(np.int64)
        whole = self.windows.take(chosen)
        is_mine = (
            deal(sequence_cost(whole.lengths, self.attention_equals_rest_at), self.worker.size) == self.worker.rank
        )
        rows, starts, lengths, context = (values[is_mine] for values in whole)
        events = self.dataset.read(starts, lengths + 1)
        return _assemble(events, rows, lengths, context, self.features, self.target_weights)

    def _train_batch(self, epoch: int, begin: int, end: int) -> TrainBatch:
        if begin <= len(self.windows) // 2 < end:
            self.bounds(epoch + 1), self._order(epoch + 1)  # computed early, so that no step waits for it
        return TrainBatch(epoch, end, end == len(self.windows), self.batch(epoch, begin, end))

    def _compute_order(self, epoch: int) -> NDArray[np.integer[Any]]:
        """(sequences,) the numbers of the sequences in the order of the epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.windows))
        return order.astype(np.int32) if order.size < 2**31 else order

    def _compute_bounds(self, epoch: int, first: int) -> IntArray:
        size = len(self.windows)
        if self.data.tokens_per_batch is None:
            return np.append(np.arange(first, size, self.data.batch_size * self.shares), size)
        tokens = np.cumsum(self.windows.take(self._order(epoch).astype(np.int64)).lengths)
        bounds = [first]
        while bounds[-1] < size:
            used = int(tokens[bounds[-1] - 1]) if bounds[-1] else 0
            fits = int(np.searchsorted(tokens, used + self.data.tokens_per_batch * self.shares, side="right"))
            bounds.append(max(fits, bounds[-1] + 1))
        return np.array(bounds)


class EvaluationLoader:
    """Batches of one rank for one held-out part. Each user with a target occurs once, in the order of the users' rows.

    Every rank has the same number of batches; in the last one a rank may have no history.

    Args:
        num_items: as in `PreparedDataset.targets`; events of other items are left out. None: all items.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        data: DataConfig,
        part: HeldOut,
        worker: Worker,
        features: Features = NO_FEATURES,
        num_items: int | None = None,
    ) -> None:
        self.dataset, self.data, self.worker, self.features = dataset, data, worker, features
        self.history_len = data.history_len(bool(features.users))
        self.num_items = dataset.num_items if num_items is None else num_items
        self.user_rows, self.positions = dataset.targets(Split.of(data), part, num_items)

    def num_batches(self) -> int:
        return -(-self.user_rows.size // (self.data.eval_batch_size * self.worker.size))

    def batches(self) -> Generator[EvaluationBatch, None, None]:
        """Yields all batches, which the readers prefetch."""
        makers = (partial(self.batch, index) for index in range(self.num_batches()))
        return prefetch(makers, self.data.readers, self.worker.device)

    def batch(self, index: int) -> EvaluationBatch:
        size = self.data.eval_batch_size * self.worker.size
        chosen = slice(index * size + self.worker.rank, (index + 1) * size, self.worker.size)
        rows, positions = self.user_rows[chosen], self.positions[chosen]
        begins = self.dataset.user_offsets[rows]
        histories = positions - begins
        events = self.dataset.read(begins, histories + 1)
        if self.num_items < self.dataset.num_items:
            known = events["item"] < self.num_items
            histories = np.diff(_offsets(known.astype(np.int64))[_offsets(histories + 1)]) - 1
            events = events[known]
        lengths = np.minimum(histories, self.history_len)
        seen_offsets = _offsets(histories)
        ends = seen_offsets[1:] + np.arange(rows.size)  # positions of the targets
        is_target = np.zeros(events.size, bool)
        is_target[ends] = True
        windows = events[concatenated(ends - lengths, lengths + 1)]
        return EvaluationBatch(
            sequences=_assemble(windows, rows, lengths, np.zeros_like(lengths), self.features),
            targets=_int64(events["item"][is_target]),
            seen_ids=_int64(events["item"][~is_target]),
            seen_offsets=_int64(seen_offsets),
        )


def _assemble(
    events: Records,
    rows: IntArray,
    lengths: IntArray,
    context: IntArray,
    features: Features,
    weights: TargetWeights | None = None,
) -> SequenceBatch:
    """Sequences of ``lengths`` tokens; ``events`` contains the tokens of each and the event that follows."""
    offsets = _offsets(lengths)
    first, last = np.ones((2, events.size), bool)
    first[offsets[:-1] + np.arange(rows.size)] = False
    last[offsets[1:] + np.arange(rows.size)] = False
    trained = None
    if context.any():
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        trained = torch.from_numpy(within >= np.repeat(context, lengths))
    target_weights = None
    if weights is not None:
        target_weights = torch.from_numpy(weights.of(events[first]))
        trained = target_weights > 0 if trained is None else trained & (target_weights > 0)
        target_weights = target_weights.masked_fill(~trained, 0.0)
    return SequenceBatch(
        item_ids=_int64(events["item"][last]),
        seq_offsets=_int64(offsets),
        timestamps=_int64(events["timestamp"]),
        target_ids=_int64(events["item"][first]),
        user_rows=_int64(rows),
        trained=trained,
        target_weights=target_weights,
        event_features=_columns([events[parts_column(name)][last] for name in features.events]),
        user_features=_columns(
            [
                # The value of the first event, because later values must not be visible to earlier tokens.
                rows + 1 if name == USER_ID else events[parts_column(name)][offsets[:-1] + np.arange(rows.size)]
                for name in features.users
            ]
        ),
    )


def _columns(columns: list[NDArray[Any]]) -> Tensor | None:
    """The columns stacked to (rows, columns); None if there are none."""
    return _int64(np.stack(columns, axis=1)) if columns else None


def _offsets(lengths: IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _int64(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
