"""The M item-embedding tables, sharded over the ranks by TorchRec.

A step looks up the distinct items it needs once, in one `EmbeddingCollection`. Tables that are updated number by number are
stored side by side in one wide table (`mme.table_placement.views_together`), so that an id is sent once and brings the rows of
all M tables; to the outside they stay M tables. TorchRec's planner decides where the rows are stored (`mme.distributed.table_plan`).

Row-wise Adagrad, Adagrad and SGD run in the backward pass of FBGEMM's tables, and so does Adam on CUDA. They update only the
rows that a batch looks up. FBGEMM has no Adam on a CPU and TorchRec none for replicated tables, so `touched_rows` implements
the same update for both. `dense_adam` is torch.optim.AdamW with the gradient of whole shards, which updates every row.

Legend: M tables, d view width, U distinct items of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchrec
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from kernels.splitmix import derive
from mme.config import Config
from mme.distributed.table_plan import EPS, FEATURE, STORED, item_collection, plan_tables, stored_name, table_sharder
from mme.distributed.touched_rows import TouchedRowsAdam, TouchedRowTables, replace_dense_tables
from mme.distributed.world import World
from mme.errors import UserError
from mme.table_placement import views_together

INIT_STD = 0.02
INIT_ROWS = 8192  # rows initialised at once, so that temporaries stay in a core's cache

# Maps the names of optimizer states in TorchRec (the first is always momentum1) and torch.optim to those in checkpoints.
STATE_NAMES = {
    "adam": {"momentum1": "exp_avg"},
    "dense_adam": {},
    "adagrad": {"sum": "momentum1"},
    "rowwise_adagrad": {"sum": "momentum1"},
    "sgd": {},
}


@dataclass(frozen=True)
class Shard:
    """A rank's part of one table or of one optimizer state: ``tensor`` starts at ``offsets`` of a tensor of ``shape``.

    ``tensor`` is a view of the table: writing to it changes the table (then see `ItemTables.forget_cached_rows`).
    """

    name: str
    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class ItemTables:
    """Lookup and update of M sharded tables of shape (num_rows, d): items, then the values of features.

    Attributes:
        placements: where each table lives.
        replicated: the names of the tables of which every rank has a whole copy.
        views: tables that are stored side by side, see `mme.table_placement.views_together`.
    """

    def __init__(self, config: Config, num_rows: int, world: World, initialise: bool = True) -> None:
        """``initialise``: draw initial weights. Otherwise load a checkpoint or call `initialise`.

        Raises:
            UserError: the device does not have `parallel.table_placement`, or the tables do not fit into its memory.
        """
        logging.getLogger("torchrec").setLevel(logging.ERROR)
        model, train = config.model, config.train
        self.num_rows, self.seed = num_rows, train.seed
        self.dim = model.view_dim
        self.device = world.device
        self.optimizer_name = train.table_optimizer
        self.names = [f"item_{table}" for table in range(model.num_tables)]
        self.views = views_together(config, config.parallel.table_sharding, world.size)
        collection, sharder = item_collection(config, num_rows, self.views), table_sharder(config)
        plan, self.placements = plan_tables(collection, sharder, config, num_rows, world)
        self.replicated = {found.table for found in self.placements if found.sharding == "data_parallel"}
        on_cpu = world.device.type == "cpu"
        if train.table_optimizer == "dense_adam" or (on_cpu and train.table_optimizer == "adam"):
            for table in plan.plan[""].values():  # type: ignore[attr-defined]
                table.compute_kernel = EmbeddingComputeKernel.DENSE.value
        elif on_cpu:
            self._require_rows_everywhere(plan, config)
        self.model = DistributedModelParallel(
            collection,
            device=world.device,
            plan=plan,
            sharders=[sharder],  # type: ignore[list-item]
        )
        touched_rows = replace_dense_tables(self.model.module) if train.table_optimizer == "adam" else []
        if on_cpu:
            _return_sequences_from_dense_cpu_tables(self.model.module)  # type: ignore[arg-type]
        if initialise:
            self.initialise()
        self.optimizer = self._unfused_optimizer(config, world, touched_rows)

    def lookup(self, ids: Tensor) -> Tensor:
        """(U,) int64 distinct indices → (U, M, d) their rows in the M tables, differentiable."""
        ids = ids.contiguous()  # FBGEMM's operators read the ids as if they were
        features = torchrec.KeyedJaggedTensor(keys=[FEATURE], values=ids, lengths=ids.new_full((1,), ids.numel()))
        rows = self.model(features)
        stored = [stored_name(table, self.views) for table in range(0, len(self.names), self.views)]
        # With one table TorchRec keeps the feature's own name; a feature shared by tables comes back as feature@table.
        keys = [f"{FEATURE}@{name}" for name in stored] if len(stored) > 1 else [FEATURE]
        wide = torch.stack([rows[key].values() for key in keys], dim=1) if len(keys) > 1 else rows[FEATURE].values()
        return wide.view(ids.numel(), len(self.names), self.dim)

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next backward and step."""
        groups = [*self.model.fused_optimizer.param_groups, *(self.optimizer.param_groups if self.optimizer else [])]
        for group in groups:
            group["lr"] = lr
        self.model.fused_optimizer.step()  # passes the rate to the fused tables; they update in backward

    def step(self) -> None:
        """Applies and clears the gradients of tables that are not updated in backward; a collective of all ranks."""
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Iterator[Shard]:
        """This rank's parts of the tables, named item_0 … item_{M-1}."""
        for key, value in self.model.state_dict().items():
            for shard in _local_shards(key.split(".")[-2], value):
                yield from self._views_of(shard)

    def whole_rows(self) -> tuple[int, list[Tensor]] | None:
        """This rank's first row and its rows (n, d) of the M tables as views; None if rows are split or tables are scattered.

        With row-wise sharding, ranks have consecutive rows, the last ones perhaps none. Replicas have all rows.
        """
        if {found.sharding for found in self.placements} not in ({"row_wise"}, {"data_parallel"}):
            return None
        shards = {shard.name: shard for shard in self.weights()}
        first = next((shard.offsets[0] for shard in shards.values()), self.num_rows)
        none = torch.empty(0, self.dim, device=self.device)
        return first, [shards[name].tensor if name in shards else none for name in self.names]

    def optimizer_states(self) -> Iterator[Shard]:
        """This rank's parts of the optimizer states, named as in `STATE_NAMES`: item_0/exp_avg, for example."""
        names = STATE_NAMES[self.optimizer_name]
        for key, states in self.model.fused_optimizer.state_dict()["state"].items():
            for state, value in states.items():
                name = state.split(".")[-1]
                for shard in _local_shards(key.split(".")[-2], value):
                    yield from self._views_of(shard, f"/{names.get(name, name)}")
        if self.optimizer is None:
            return
        for key, weights in self.model.state_dict().items():
            for shard in _local_shards(key.split(".")[-2], weights):
                for state, found in self._unfused_states(shard):
                    yield from self._views_of(found, f"/{names.get(state, state)}")

    def _unfused_states(self, shard: Shard) -> Iterator[tuple[str, Shard]]:
        """The states that an optimizer of torch.optim keeps for a part of a stored table, by their names there."""
        assert self.optimizer is not None
        # A parameter contains this rank's parts of all tables, one after another.
        for parameter, states in self.optimizer.state.items():
            start = (shard.tensor.data_ptr() - parameter.data_ptr()) // parameter.element_size()
            if not 0 <= start < parameter.numel():
                continue
            for state, value in states.items():
                if value.shape == parameter.shape:
                    piece = value.view(-1)[start : start + shard.tensor.numel()].view(shard.tensor.shape)
                    yield state, replace(shard, tensor=piece)
                elif value.dim():  # one value per row
                    first, rows = start // shard.tensor.shape[1], shard.tensor.shape[0]
                    piece = value.view(-1)[first : first + rows]
                    yield state, replace(shard, tensor=piece, offsets=shard.offsets[:1], shape=shard.shape[:1])

    def _views_of(self, stored: Shard, state: str = "") -> Iterator[Shard]:
        """The parts of the item tables, or of their ``state``, in a part of a stored table."""
        first = self.views * int(stored.name.removeprefix(STORED))
        if self.views == 1:
            yield replace(stored, name=f"{self.names[first]}{state}")
            return
        shape = (stored.shape[0], self.dim)
        for view, columns in enumerate(stored.tensor.split(self.dim, dim=1)):
            yield Shard(f"{self.names[first + view]}{state}", columns, stored.offsets, shape)

    def set_optimizer_step(self, step: int) -> None:
        """Sets the number of applied steps, on which Adam's bias correction depends."""
        for state in self.optimizer.state.values() if self.optimizer else ():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(step)
        for module in self._fused_modules():
            # FBGEMM's set_optimizer_step sets only the second counter and copies it to the first only if that is 0.
            module.iter_cpu.fill_(step)
            module.iter.fill_(step)

    def _require_rows_everywhere(self, plan: Any, config: Config) -> None:
        """Raises UserError if a rank would have no row of a fused table: FBGEMM's CPU kernels cannot update it."""
        shards = [
            shard for table in plan.plan[""].values() if table.sharding_spec for shard in table.sharding_spec.shards
        ]
        if any(0 in shard.shard_sizes for shard in shards):
            raise UserError(
                f"parallel.table_sharding={config.parallel.table_sharding}: a process would have none of the "
                f"{self.num_rows} rows of an item table, which train.table_optimizer={self.optimizer_name} does not support "
                "on a CPU: expected fewer processes, or data_parallel"
            )

    def forget_cached_rows(self) -> None:
        """Empties the caches of tables in host memory. Call it after writing to `weights`, of which caches know nothing."""
        for module in self._fused_modules():
            module.reset_cache_states()

    def _fused_modules(self) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
        for lookup in self.model.module._lookups:  # type: ignore[union-attr]
            for module in lookup.modules():  # type: ignore[union-attr]
                if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                    yield module

    @torch.no_grad()
    def initialise(self, chosen: Callable[[range], Tensor] | None = None) -> None:
        """Draws initial weights from a normal distribution truncated at two standard deviations.

        A weight depends only on the seed, its table, row and column, and not on the number of ranks, sharding or device.

        Args:
            chosen: says which of consecutive rows to initialise, (rows,) bool; None: all.
        """
        low = torch.special.ndtr(torch.tensor(-2.0)).item()
        for shard in self.weights():
            (first, left), (count, columns) = shard.offsets, shard.tensor.shape
            table_key = torch.tensor([mix_seed(self.seed, self.names.index(shard.name))], device=self.device)
            words = torch.arange(left // 2, -(-(left + columns) // 2), device=self.device)
            for start in range(0, count, INIT_ROWS):
                part = slice(start, min(start + INIT_ROWS, count))
                wanted = None if chosen is None else chosen(range(first + part.start, first + part.stop))
                if wanted is not None and not wanted.any():
                    continue
                keys = derive(table_key, torch.arange(first + part.start, first + part.stop, device=self.device))
                bits = derive(keys[:, None], words).view(torch.int32)[:, left % 2 : left % 2 + columns]  # 2 per word
                uniform = ((bits >> 8) + (2**23 + 0.5)) * 2.0**-24
                values = torch.erfinv(2 * (low + (1 - 2 * low) * uniform) - 1) * (INIT_STD * 2**0.5)
                values.clamp_(-2 * INIT_STD, 2 * INIT_STD)  # removes rounding errors at the ends
                if wanted is None:
                    shard.tensor[part] = values
                else:
                    wanted = wanted.to(self.device)
                    shard.tensor[part][wanted] = values[wanted]
        self.forget_cached_rows()

    def _unfused_optimizer(
        self, config: Config, world: World, touched_rows: list[TouchedRowTables]
    ) -> torch.optim.Optimizer | None:
        """The optimizer of tables that FBGEMM does not update in backward; None if there are none."""
        train = config.train
        lr, betas = train.table_lr or train.lr, (train.beta1, train.beta2)
        if touched_rows:
            return TouchedRowsAdam(touched_rows, world, lr, betas, EPS)
        fused = set(self.model.fused_optimizer.params)
        parameters = [p for name, p in self.model.named_parameters() if p.numel() and name not in fused]
        if not parameters:
            return None
        match train.table_optimizer:
            case "dense_adam":
                adam = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=EPS, weight_decay=0.0)
                for parameter in parameters:  # created early, so that a checkpoint can be loaded before the first step
                    moments = {state: torch.zeros_like(parameter.detach()) for state in ("exp_avg", "exp_avg_sq")}
                    adam.state[parameter] = {"step": torch.zeros(()), **moments}
                return adam
            case "adagrad":
                return torch.optim.Adagrad(parameters, lr=lr, eps=EPS)
            case "rowwise_adagrad":
                return RowWiseAdagrad(parameters, lr=lr, eps=EPS)
            case _:
                return torch.optim.SGD(parameters, lr=lr)


def mix_seed(*parts: int) -> int:
    """Combines several numbers into one seed for torch."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part) % 2**63
    return seed


def _local_shards(name: str, value: Any) -> Iterator[Shard]:
    if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
        yield Shard(name, value.detach(), (0,) * value.dim(), tuple(value.shape))
        return
    for shard in value.local_shards():
        yield Shard(name, shard.tensor.detach(), tuple(shard.metadata.shard_offsets), tuple(value.size()))


def _return_sequences_from_dense_cpu_tables(collection: nn.Module) -> None:
    """Makes FBGEMM's dense CPU tables return one row for each id, table after table.

    Their CPU operator pools each bag and interleaves the tables in any pooling mode (fbgemm_gpu 1.6 to 1.8). With bags of
    one id nothing is pooled, and a hook restores the order that TorchRec expects. All tables share one feature, so all have
    the same number of ids.
    """

    def one_id_a_bag(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        ids = kwargs["indices"]
        return args, {**kwargs, "offsets": torch.arange(ids.numel() + 1, dtype=ids.dtype)}

    def table_after_table(module: Any, args: Any, kwargs: Any, rows: Tensor) -> Tensor:
        return rows.view(-1, module.D_offsets.numel() - 1, module.max_D).transpose(0, 1).reshape(-1, module.max_D)

    for lookup in collection._lookups:  # type: ignore[union-attr]
        for module in lookup.modules():  # type: ignore[union-attr]
            if isinstance(module, DenseTableBatchedEmbeddingBagsCodegen):
                module.register_forward_pre_hook(one_id_a_bag, with_kwargs=True)
                module.register_forward_hook(table_after_table, with_kwargs=True)
