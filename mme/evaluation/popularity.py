"""The popularity baseline: items in descending order of training events, the same list for every user.

Legend: B histories, n all their events.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mme.evaluation.metrics import UNRANKED
from mme.evaluation.seen import is_repeated


def popularity_order(counts: Tensor) -> Tensor:
    """(num_items,) counts of training events → (num_items,) int64 place of each item, 0 for the most popular.

    Equally popular items are in the order of their index.
    """
    order = torch.argsort(counts, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


@dataclass(frozen=True)
class Popularity:
    """How often each item occurs in training, and its place among all items.

    Attributes:
        counts: (num_items,) int64, training events of each item.
        place: (num_items,) int64, see `popularity_order`.
    """

    counts: Tensor
    place: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> Popularity:
        return cls(counts, popularity_order(counts))


def popularity_ranks(place: Tensor, targets: Tensor, excluded_ids: Tensor, excluded_offsets: Tensor) -> Tensor:
    """The rank by popularity of each user's target among the items that are not excluded.

    Args:
        place: (num_items,) int64, of each item in the order of popularity.
        targets: (B,) int64 item indices.
        excluded_ids: (n,) int64, the items that must not be ranked for each user; an item may occur several times.
        excluded_offsets: (B + 1,) int64, their offsets.

    Returns:
        (B,) int64, starting at 1; `UNRANKED` for a target that is excluded.
    """
    user = torch.repeat_interleave(torch.arange(targets.numel(), device=targets.device), excluded_offsets.diff())
    distinct = torch.unique(user * place.numel() + excluded_ids)
    user, item = distinct // place.numel(), distinct % place.numel()
    before = (place[item] < place[targets[user]]).long()
    ranks = 1 + place[targets] - torch.zeros_like(targets).index_add_(0, user, before)
    return ranks.masked_fill(is_repeated(targets, excluded_ids, excluded_offsets), UNRANKED)
