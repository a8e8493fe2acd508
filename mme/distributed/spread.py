"""Values of all items, each kept by one rank and fetched by the others when they need it.

Legend: I items, S items of a rank's share, n ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mme.distributed.world import World


def share_of(num_items: int, world: World) -> range:
    """The items whose values this rank keeps: equal slices in rank order, of which the last may be shorter or empty."""
    share = -(-num_items // world.size)
    return range(min(world.rank * share, num_items), min((world.rank + 1) * share, num_items))


@dataclass(frozen=True)
class SpreadValues:
    """``values`` (S, …) of this rank's share of ``num_items`` items."""

    world: World
    num_items: int
    values: Tensor

    def of(self, ids: Tensor) -> Tensor:
        """(n, …) the values of any items, (n,) int64; a collective, with different ids on each rank."""
        if self.world.size == 1:
            return self.values[ids]
        share, size = -(-self.num_items // self.world.size), self.world.size
        ids, order = ids.sort()
        wanted = torch.bincount(ids // share, minlength=size)
        asked = _exchanged(wanted, [1] * size, [1] * size).tolist()
        sent = wanted.tolist()
        places = _exchanged(ids, sent, asked) - self.world.rank * share
        received = _exchanged(self.values[places], asked, sent)
        return torch.empty_like(received).index_copy_(0, order, received)


def _exchanged(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """What all ranks send to this one: ``sent[r]`` rows go to rank r, and ``received[r]`` come from it."""
    found = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(found, values.contiguous(), received, sent)
    return found
