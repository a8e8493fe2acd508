"""The popularity baseline: items in descending order of training events, the same list for every user.

Legend: B histories, n all their events, S items of a rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mme.distributed.spread import SpreadValues
from mme.distributed.world import World
from mme.evaluation.metrics import UNRANKED
from mme.evaluation.seen import is_repeated


@dataclass(frozen=True)
class Popularity:
    """How often each item occurs in training, and its place among all items.

    Attributes:
        num_items: items of the catalogue, of which each rank keeps a share.
        num_events: their training events.
        facts: (S, 2) int64 for each item of the share: its training events, and its place in the order of popularity, from 0.
            Equally popular items are in the order of their index.
    """

    num_items: int
    num_events: int
    facts: SpreadValues

    @classmethod
    def of(cls, counts: Tensor, num_items: int, world: World) -> Popularity:
        """``counts``: (S,) int64, training events of the items of this rank's share (`share_of`). A collective."""
        events = int(world.sum(counts.sum()))
        return cls(num_items, events, SpreadValues(world, num_items, torch.stack([counts, _places(counts, world)], 1)))

    def of_items(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) int64 training events and (n,) int64 places of the items ``ids``, (n,) int64. A collective."""
        counts, places = self.facts.of(ids).unbind(1)
        return counts, places


def _places(counts: Tensor, world: World) -> Tensor:
    """(S,) int64 places of this rank's items among those of all ranks. A collective.

    Items with more events come first, then those with as many events of earlier ranks and earlier in this one.
    """
    ordered, order = torch.sort(counts, descending=True, stable=True)
    own = torch.stack(
        torch.unique_consecutive(ordered, return_counts=True), 1
    )  # few: distinct counts, and how many items
    by_rank = world.gather(own)
    ahead = torch.zeros_like(own[:, 0])
    for rank, (values, items) in enumerate(of.unbind(1) for of in by_rank):
        upto = torch.cat([items.new_zeros(1), items.cumsum(0)])
        # Values descend, so that −values ascend.
        ahead += upto[torch.searchsorted(-values, -own[:, 0], right=rank < world.rank)]
    # Within an equally popular group, an item follows those of this rank before it.
    first_of_group = torch.repeat_interleave(own[:, 1].cumsum(0) - own[:, 1] - ahead, own[:, 1])
    places = torch.arange(order.numel(), device=order.device) - first_of_group
    return torch.empty_like(order).scatter_(0, order, places)


def popularity_ranks(places: Tensor, excluded_places: Tensor, excluded_offsets: Tensor) -> Tensor:
    """The rank by popularity of each user's target among the items that are not excluded.

    Args:
        places: (B,) int64, of the targets in the order of popularity.
        excluded_places: (n,) int64, those of the items that must not be ranked for each user; an item may occur several times.
        excluded_offsets: (B + 1,) int64, their offsets.

    Returns:
        (B,) int64, starting at 1; `UNRANKED` for a target that is excluded.
    """
    user = torch.repeat_interleave(torch.arange(places.numel(), device=places.device), excluded_offsets.diff())
    before = excluded_places < places[user]
    user, _ = torch.unique(torch.stack([user[before], excluded_places[before]]), dim=1)
    ranks = 1 + places - torch.bincount(user, minlength=places.numel())
    return ranks.masked_fill(is_repeated(places, excluded_places, excluded_offsets), UNRANKED)
