"""Clips the gradients of decoder, experts and item tables by their common norm.

It is the norm of the global batch's gradient. The ranks hold disjoint parts of the decoder's reduced gradient, including
the experts'. The tables' gradient is a row per item on every rank that looked the item up. Rows of the same item must be
summed on one rank first, because ‖Σ g‖ is not Σ ‖g‖. This exchange happens only if a limit is set.

Legend: U distinct items that a rank looked up, M tables, d view width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mme.distributed.world import World


def clip_gradients(
    world: World, decoder: list[Tensor], ids: Tensor, rows: Tensor, num_items: int, limit: float
) -> Tensor:
    """Scales all gradients, in place, so that their norm is at most ``limit``; returns the norm before.

    Args:
        decoder: this rank's parts of the decoder's gradient, averaged over the ranks.
        ids: (U,) int64, ascending.
        rows: (U, M, d) the gradient of their rows on this rank, not yet averaged over the ranks.
    """
    squares = sum((part.double().square().sum() for part in decoder), rows.new_zeros((), dtype=torch.float64))
    squares = squares + sum_over_ranks(world, ids, rows, num_items).double().div_(world.size).square_().sum()
    norm = world.sum(squares).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1)  # times 1 changes no bit, and the host need not know
    for part in [*decoder, rows]:
        part.mul_(factor)
    return norm


def sum_over_ranks(world: World, ids: Tensor, rows: Tensor, num_items: int) -> Tensor:
    """Sums rows over the ranks, in rank order; each rank gets the sums of its own range of items."""
    if world.size == 1:
        return rows
    borders = torch.arange(1, world.size, device=ids.device) * num_items // world.size
    cuts = torch.searchsorted(ids, borders).tolist()
    sent = [end - start for start, end in zip([0, *cuts], [*cuts, ids.numel()], strict=True)]
    counts = torch.tensor(sent, device=ids.device)
    received_counts = torch.empty_like(counts)
    dist.all_to_all_single(received_counts, counts)
    received = received_counts.tolist()

    def exchange(values: Tensor) -> list[Tensor]:
        arrived = values.new_empty(sum(received), *values.shape[1:])
        dist.all_to_all_single(arrived, values.contiguous(), received, sent)
        return list(arrived.split(received))

    ids_by_rank, rows_by_rank = exchange(ids), exchange(rows)
    distinct, place = torch.cat(ids_by_rank).unique(return_inverse=True)
    total = rows.new_zeros(distinct.numel(), *rows.shape[1:])
    for where, values in zip(place.split(received), rows_by_rank, strict=True):
        total[where] += values  # one rank's items are distinct
    return total
