"""Clips the gradients of decoder, experts and item tables by their common norm.

It is the norm of the global batch's gradient. The ranks hold disjoint parts of the decoder's reduced gradient, including
the experts'. The tables' gradient is a row per item on every rank that looked the item up. Rows of the same item must be
summed on one rank first, because ‖Σ g‖ is not Σ ‖g‖. For sharded tables that is the rank that owns the row: backward brings
the gradients there anyway, and `OwnedGradients` holds them until the norm is known. Only replicated tables need an exchange
for the norm.

Legend: U distinct items that a rank looked up, M tables, d view width; K tables (or parts) of a rank, c columns, n ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.types import ShardingType

from mme.distributed.tables import ItemTables
from mme.distributed.touched_rows import TouchedRowTables
from mme.distributed.world import World

LOCAL_TABLES = (SplitTableBatchedEmbeddingBagsCodegen, DenseTableBatchedEmbeddingBagsCodegen, TouchedRowTables)


class _Held(NamedTuple):
    """One lookup of a rank's tables: ids (n,), the rows (K·n, c) attached to the tables, and a leaf with their values."""

    ids: Tensor
    rows: Tensor
    leaf: Tensor


class OwnedGradients:
    """Stops backward at the ranks that own the looked-up rows, after the exchange and before the tables' update.

    FBGEMM's tables update in their backward, so the gradient cannot be scaled between its arrival and the update otherwise.
    Every lookup with gradients must be followed by `apply` or `drop`.
    """

    def __init__(self, tables: ItemTables) -> None:
        self._held: list[_Held] = []
        for lookup in tables.model.module._lookups:  # type: ignore[union-attr]
            for module in lookup.modules():  # type: ignore[union-attr]
                if isinstance(module, LOCAL_TABLES):
                    module.register_forward_hook(self._hold, with_kwargs=True)

    @staticmethod
    def needed_by(tables: ItemTables, world: World) -> bool:
        """Whether rows are exchanged, and every row has one owner."""
        shardings: Any = tables.model.module._sharding_type_to_sharding  # type: ignore[union-attr]
        return world.size > 1 and ShardingType.DATA_PARALLEL.value not in shardings

    def _hold(self, module: nn.Module, _: Any, named: dict[str, Tensor], rows: Tensor) -> Tensor | None:
        if not rows.requires_grad:
            return None
        num_tables = len(module.split_embedding_weights())  # type: ignore[operator]
        ids = named["indices"].view(num_tables, -1)[0]  # all tables share one feature
        leaf = rows.detach().requires_grad_()
        self._held.append(_Held(ids, rows, leaf))
        return leaf

    def squared_norm(self) -> Tensor:
        """() float64 the sum of squares of this rank's part of the gradient, averaged over the ranks."""
        total = torch.zeros((), dtype=torch.float64)
        for ids, _, leaf in self._held:
            assert leaf.grad is not None
            if not ids.numel():  # no process has looked up a row of this rank
                continue
            gradient = leaf.grad.view(-1, ids.numel(), leaf.shape[-1])
            total = total.to(leaf.device) + _sums_by_id(ids, gradient).double().square_().sum()
        return total

    def scale(self, factor: float) -> None:
        for _, _, leaf in self._held:
            assert leaf.grad is not None
            leaf.grad.mul_(factor)

    def apply(self) -> None:
        """Passes the gradients on to the tables."""
        for _, rows, leaf in self._held:
            rows.backward(leaf.grad)
        self.drop()

    def drop(self) -> None:
        self._held.clear()


def _sums_by_id(ids: Tensor, gradient: Tensor) -> Tensor:
    """ids (n,), gradient (K, n, c) → (n, K·c), the sums of the rows of equal ids, in their order, and zeros.

    The host reads no size, and no atomic additions change the bits.
    """
    ids, order = ids.sort(stable=True)
    place = torch.nn.functional.pad(ids.diff() != 0, (1, 0))[: ids.numel()].cumsum(0)
    lengths = torch.zeros_like(ids).scatter_add_(0, place, torch.ones_like(ids))
    rows = gradient.transpose(0, 1).flatten(1).index_select(0, order)
    return torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True, initial=0)


def sum_over_ranks(world: World, ids: Tensor, rows: Tensor, num_items: int) -> Tensor:
    """Sums rows (U, M, d) over the ranks, in rank order; each rank gets the sums of its own range of items.

    ``ids`` (U,) int64, ascending.
    """
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
