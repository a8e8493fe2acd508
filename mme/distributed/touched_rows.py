"""Adam for the rows that a batch looks up, for CPUs and replicated tables, for which FBGEMM has none.

The arithmetic is that of FBGEMM's Adam on CUDA. With the gradient g of a row that step t looks up,

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    w ← w − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

and all other rows keep their values and moments. The bias correction counts the steps of the job, not those of the row.

Legend: K tables (or parts of tables) of one shape, R rows, c columns, n looked-up ids, U distinct ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mme.distributed.world import World

NUMBERS_AT_ONCE = 65_536  # so that moments and temporaries stay in a core's cache: a fifth faster than all rows at once


class TouchedRowTables(nn.Module):
    """K tables of (R, c) that replace FBGEMM's dense ones. Their gradient covers only the looked-up rows.

    Attributes:
        weights: (K·R·c,) the parameter of the replaced tables, one table after another.
        is_replica: whether every rank holds the same rows.
    """

    def __init__(self, dense: DenseTableBatchedEmbeddingBagsCodegen, is_replica: bool) -> None:
        super().__init__()
        self.weights, self.is_replica = dense.weights, is_replica
        self._tables = [table.detach() for table in dense.split_embedding_weights()]
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """indices (K·n,) int64, the same n for each table → (K·n, c), table after table. ``offsets`` is not used."""
        return _Lookup.apply(self.weights, indices.view(len(self._tables), -1)[0], self)

    def split_embedding_weights(self) -> list[Tensor]:
        """The K tables (R, c), through which TorchRec reads and writes the weights."""
        return self._tables

    def rows(self, ids: Tensor) -> Tensor:
        rows = self.weights.new_empty(len(self._tables), ids.numel(), self._tables[0].shape[1])
        for table, out in zip(self._tables, rows.unbind(), strict=True):
            torch.index_select(table, 0, ids, out=out)
        return rows.flatten(0, 1)

    def add_gradient(self, ids: Tensor, gradient: Tensor) -> None:
        """Stores the gradient (K·n, c) of one lookup of ``ids`` (n,) until `take_gradient`."""
        self._gradients.append((ids, gradient.view(len(self._tables), *ids.shape, self._tables[0].shape[1])))

    def take_gradient(self, world: World) -> tuple[Tensor, Tensor]:
        """Distinct ids (U,) and the gradient (K, U, c) of their rows since the last call; a collective for replicas."""
        lookups, self._gradients = self._gradients, []
        if self.is_replica and world.size > 1:
            ids, by_id = (torch.cat([lookup[0] for lookup in lookups]), torch.cat([lookup[1] for lookup in lookups], 1))
            gathered = zip(world.gather(ids), world.gather(by_id.transpose(0, 1).contiguous()), strict=True)
            lookups = [(rank_ids, rows.transpose(0, 1) / world.size) for rank_ids, rows in gathered]
        if len(lookups) == 1 and world.size == 1:
            return lookups[0]  # a lookup has distinct ids
        distinct, place = torch.cat([ids for ids, _ in lookups]).unique(return_inverse=True)
        total = self.weights.new_zeros(len(self._tables), distinct.numel(), self._tables[0].shape[1])
        first = 0
        for ids, gradient in lookups:
            for table_total, table_gradient in zip(total, gradient, strict=True):
                table_total.index_add_(0, place[first : first + ids.numel()], table_gradient)
            first += ids.numel()
        return distinct, total


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, ids: Tensor, tables: TouchedRowTables) -> Tensor:
        ctx.ids, ctx.tables = ids, tables
        return tables.rows(ids)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.tables.add_gradient(ctx.ids, gradient)
        return None, None, None


class TouchedRowsAdam(torch.optim.Optimizer):
    """Adam of `TouchedRowTables`; the states have the layout of the parameters, as in torch.optim."""

    def __init__(
        self, tables: Sequence[TouchedRowTables], world: World, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__([table.weights for table in tables], {"lr": lr, "betas": betas, "eps": eps})
        self._tables, self._world = tables, world
        for table in tables:  # created early, so that a checkpoint can be loaded before the first step
            moments = {name: torch.zeros_like(table.weights.detach()) for name in ("exp_avg", "exp_avg_sq")}
            self.state[table.weights] = {"step": torch.zeros(()), **moments}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the rows looked up since the last step; a collective."""
        (group,) = self.param_groups
        for table in self._tables:
            state = self.state[table.weights]
            state["step"] += 1
            ids, gradient = table.take_gradient(self._world)
            weights = table.split_embedding_weights()
            moments = [state[name].view(len(weights), *weights[0].shape) for name in ("exp_avg", "exp_avg_sq")]
            options = {key: group[key] for key in ("lr", "betas", "eps")}
            for weight, exp_avg, exp_avg_sq, g in zip(weights, *moments, gradient, strict=True):
                _update(weight, exp_avg, exp_avg_sq, g, ids, step=float(state["step"]), **options)


def _update(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    ids: Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Updates the distinct rows ``ids`` (U,) of a table (R, c) by their ``gradient`` (U, c)."""
    beta1, beta2 = betas
    at_once = max(1, NUMBERS_AT_ONCE // weight.shape[1])
    for rows, g in zip(ids.split(at_once), gradient.split(at_once), strict=True):
        m = exp_avg.index_select(0, rows).lerp_(g, 1 - beta1)
        v = exp_avg_sq.index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        exp_avg.index_copy_(0, rows, m)
        exp_avg_sq.index_copy_(0, rows, v)
        root = v.div_(1 - beta2**step).sqrt_().add_(eps)
        weight.index_copy_(0, rows, weight.index_select(0, rows).addcdiv_(m, root, value=-lr / (1 - beta1**step)))


def replace_dense_tables(collection: Any) -> list[TouchedRowTables]:
    """Replaces FBGEMM's dense tables in a sharded `EmbeddingCollection` by `TouchedRowTables`, and returns those.

    Lookups of replicated tables are unwrapped from DistributedDataParallel, which would average a gradient of all rows.
    """
    found = []
    for place, lookup in enumerate(collection._lookups):
        is_replica = isinstance(lookup, DistributedDataParallel)
        if is_replica:
            lookup = collection._lookups[place] = lookup.module
        for kernel in lookup._emb_modules:
            if isinstance(kernel.emb_module, DenseTableBatchedEmbeddingBagsCodegen):
                kernel._emb_module = TouchedRowTables(kernel.emb_module, is_replica)
                found.append(kernel._emb_module)
    return found
