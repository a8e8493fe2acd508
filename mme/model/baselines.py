"""The baseline that every result stands beside: the most popular items that a user has not seen."""

from __future__ import annotations

import torch
from torch import Tensor


def popularity_order(counts: Tensor) -> Tensor:
    """(num_items,) counts of training events → (num_items,) int64 place of each item, 0 for the most popular.

    Equally popular items stand in the order of their index.
    """
    order = torch.argsort(counts, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def popularity_ranks(counts: Tensor, targets: Tensor, seen_ids: Tensor, seen_offsets: Tensor) -> Tensor:
    """The rank of each user's target among the items that the user has not seen, by popularity.

    Args:
        counts: (num_items,) int64, training events of each item.
        targets: (B,) int64 item indices.
        seen_ids: (S,) int64 items of each user's history, repeats allowed, and their ``seen_offsets`` (B + 1,).

    Returns:
        (B,) int64, 1 for the first.
    """
    place = popularity_order(counts)
    user = torch.repeat_interleave(torch.arange(targets.numel(), device=targets.device), seen_offsets.diff())
    distinct = torch.unique(user * counts.numel() + seen_ids)
    user, seen = distinct // counts.numel(), distinct % counts.numel()
    before = (place[seen] < place[targets[user]]).long()
    return 1 + place[targets] - torch.zeros_like(targets).index_add_(0, user, before)
