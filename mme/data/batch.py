"""SequenceBatch: the jagged tensors that flow from the loader through the model.

Legend: B sequences, T tokens (the sum of their lengths).

Worked example, three histories of lengths [2, 0, 3]:

    seq_offsets [0, 2, 2, 5]          token t of sequence b is row seq_offsets[b] + t
    item_ids    [a0 a1 | | c0 c1 c2]  T = 5
    target_ids  [a1 a2 | | c1 c2 c3]  the item that follows each token
    timestamps  [a0 a1 a2 | b0 | c0 c1 c2 c3]  T + B = 8: the times of the tokens, then of the event to be predicted
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """B jagged item sequences.

    Attributes:
        item_ids: (T,) int64, dense item indices in [0, num_items).
        seq_offsets: (B + 1,) int64, exclusive prefix sum of the lengths, each length ≤ max_seq_len.
        timestamps: (T + B,) int64 seconds; sequence b owns the L_b + 1 entries that start at
            seq_offsets[b] + b: the times of its tokens, then the time of the event to be predicted.
        target_ids: (T,) int64, the item that follows each token.
        user_rows: (B,) int64, the row of each sequence's user in the prepared data set.
        trained: (T,) bool, tokens whose target is trained on; the others are only context. None: all are trained on.
        target_weights: (T,) float32, the weight of each target in the loss, 0 where ``trained`` is false. None: all are 1.
        event_features: (T, F) int64, the values of each token's event, in the order of `model.event_features`; 0: missing or
            unknown. None: no features. It never contains features of the event to be predicted.
        user_features: (B, G) int64, the values of each user, in the order of `model.user_features`.
    """

    item_ids: Tensor
    seq_offsets: Tensor
    timestamps: Tensor
    target_ids: Tensor
    user_rows: Tensor
    trained: Tensor | None = None
    target_weights: Tensor | None = None
    event_features: Tensor | None = None
    user_features: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.seq_offsets.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.item_ids.numel()

    @property
    def num_targets(self) -> int:
        """Number of tokens whose target is trained on."""
        return self.num_tokens if self.trained is None else int(self.trained.sum())

    @property
    def trained_targets(self) -> Tensor:
        """(num_targets,) int64, the targets that are trained on."""
        return self.target_ids if self.trained is None else self.target_ids[self.trained]

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if value is not None]

    def to(self, device: torch.device) -> SequenceBatch:
        """The batch on ``device``. Copies to a GPU use pinned memory, so that they overlap with other work."""
        moved = {name: _move(value, device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def split(self, num_parts: int) -> list[SequenceBatch]:
        """Splits the batch into ``num_parts`` batches of whole sequences whose numbers differ by at most one."""
        if num_parts == 1:
            return [self]  # reading an offset would wait for the GPU
        borders = [self.num_sequences * part // num_parts for part in range(num_parts + 1)]
        parts = []
        for first, last in itertools.pairwise(borders):
            start, end = self.seq_offsets[[first, last]].tolist()
            parts.append(
                SequenceBatch(
                    item_ids=self.item_ids[start:end],
                    seq_offsets=self.seq_offsets[first : last + 1] - start,
                    timestamps=self.timestamps[start + first : end + last],
                    target_ids=self.target_ids[start:end],
                    user_rows=self.user_rows[first:last],
                    trained=None if self.trained is None else self.trained[start:end],
                    target_weights=None if self.target_weights is None else self.target_weights[start:end],
                    event_features=None if self.event_features is None else self.event_features[start:end],
                    user_features=None if self.user_features is None else self.user_features[first:last],
                )
            )
        return parts


@dataclass(frozen=True)
class EvaluationBatch:
    """B histories, the item that should rank first for each, and the items that are not ranked.

    Attributes:
        sequences: the newest ``max_seq_len`` events of each history; the last entry of each one's
            timestamps is the time of the target event, ``target_ids`` the item after each token.
        targets: (B,) int64, the held-out item of each history.
        seen_ids: (S,) int64, every item of each user's whole history before the target, jagged.
        seen_offsets: (B + 1,) int64, offsets into ``seen_ids``.
    """

    sequences: SequenceBatch
    targets: Tensor
    seen_ids: Tensor
    seen_offsets: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.sequences.tensors(), self.targets, self.seen_ids, self.seen_offsets]

    def to(self, device: torch.device) -> EvaluationBatch:
        """As `SequenceBatch.to`."""
        rest = (_move(tensor, device) for tensor in (self.targets, self.seen_ids, self.seen_offsets))
        return EvaluationBatch(self.sequences.to(device), *rest)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; the host does not wait for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
