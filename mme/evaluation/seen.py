"""What `eval.seen` means: whether items that a user has had before can be in a list.

    exclude   seen items are in no list, so a target that the user has had before is a miss (`UNRANKED`)
    include   all items are ranked

Seen items are those of the whole history before the target, not only of the part that the model reads.

Legend: B histories, n all their events.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mme.data.batch import EvaluationBatch

Seen = Literal["exclude", "include"]


def excluded_items(batch: EvaluationBatch, seen: Seen) -> tuple[Tensor, Tensor]:
    """The items that must not be ranked for each history, (n,) int64, and their offsets, (B + 1,)."""
    if seen == "exclude":
        return batch.seen_ids, batch.seen_offsets
    return batch.seen_ids[:0], torch.zeros_like(batch.seen_offsets)


def is_repeated(targets: Tensor, seen_ids: Tensor, seen_offsets: Tensor) -> Tensor:
    """(B,) bool: whether each target, (B,) int64, is among the items ``seen_ids``, (n,) int64, of its history.

    seen_ids [4, 7, 5], seen_offsets [0, 2, 3], targets [7, 4] → [True, False]
    """
    history = torch.repeat_interleave(torch.arange(targets.numel(), device=targets.device), seen_offsets.diff())
    found = torch.zeros_like(targets)
    found.index_add_(0, history, (seen_ids == targets[history]).long())
    return found > 0
