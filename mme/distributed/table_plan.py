"""TorchRec's plan of the item tables: which rank holds which part of which table, and in which memory.

The planner is told what the job has: the memory of a GPU and of the host, the processes of a node, the rates of memory and
links, and the tables' optimizer, whose states it counts. It plans on the meta device, for any number of ranks.

Legend: M tables, R rows, d view width.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import CacheParams, CommOp, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.optimizers import SGD, Adagrad, Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mme.config import Config
from mme.devices import Device, device_of, gpu_here
from mme.distributed.world import World
from mme.errors import UserError
from mme.table_placement import (
    Parts,
    TablePlacement,
    choose_placement,
    on_fullest_rank,
    require_room,
    views_together,
)

FEATURE = "item"
STORED = "items_"  # begins the names of stored tables
EPS = 1e-8
MS = 1e-3  # TorchRec's rates are in bytes per millisecond
OPTIMIZERS = {"adam": Adam, "dense_adam": Adam, "adagrad": Adagrad, "rowwise_adagrad": RowWiseAdagrad, "sgd": SGD}
KERNELS = {
    "device": EmbeddingComputeKernel.FUSED,
    "uvm": EmbeddingComputeKernel.FUSED_UVM,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING,
}
DATA_TYPES = {"float32": DataType.FP32, "float16": DataType.FP16, "bfloat16": DataType.BF16}
PLACEMENTS = {kernel.value: placement for placement, kernel in KERNELS.items()}


def device_here(world: World) -> tuple[Device, int]:
    """The device of this machine's ranks, and the number of those ranks."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.device.type == "cpu":
        return device_of("cpu", local), local
    found = torch.cuda.get_device_properties(world.device)
    return gpu_here(found.name, found.total_memory, local), local


def stored_name(table: int, views: int) -> str:
    """The name of the stored table that contains item table number ``table`` among ``views`` of them."""
    return f"{STORED}{table // views}"


def item_collection(config: Config, num_rows: int, views: int) -> torchrec.EmbeddingCollection:
    """The M tables of (R, d) on the meta device, with the optimizer that their backward applies.

    ``views`` of them are stored side by side in a table of (R, views·d).
    """
    train = config.train
    collection = torchrec.EmbeddingCollection(
        tables=[
            torchrec.EmbeddingConfig(
                name=stored_name(table, views),
                num_embeddings=num_rows,
                embedding_dim=views * config.model.view_dim,
                feature_names=[FEATURE],
                data_type=DATA_TYPES[config.parallel.table_dtype],
            )
            for table in range(0, config.model.num_tables, views)
        ],
        device=torch.device("meta"),
    )
    options = {"lr": train.table_lr or train.lr, "beta1": train.beta1, "beta2": train.beta2, "eps": EPS}
    _apply_optimizer_in_backward(OPTIMIZERS[train.table_optimizer], collection.parameters(), options)
    return collection


def table_sharder(config: Config) -> EmbeddingCollectionSharder:
    """TorchRec's sharder, which exchanges rows and their gradients as `parallel.exchange_dtype` says.

    TorchRec's `get_qcomm_codecs_registry` would replace bfloat16 by float16 on gloo, which can exchange both.
    """
    dtype = config.parallel.exchange_dtype
    if dtype == "float32":
        return EmbeddingCollectionSharder()
    forward = CommType.BF16 if dtype == "bfloat16" else CommType.FP16
    codecs = get_qcomm_codecs(QCommsConfig(forward_precision=forward, backward_precision=CommType.BF16))
    return EmbeddingCollectionSharder(qcomm_codecs_registry={CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: codecs})


def planner_of(
    config: Config, num_rows: int, ranks: int, device: Device, ranks_per_node: int
) -> EmbeddingShardingPlanner:
    """TorchRec's planner for tables of R rows on ``ranks`` of the given devices.

    Raises:
        UserError: the device does not have `parallel.table_placement`, or the tables do not fit into its memory.
    """
    sharding, optimizer = config.parallel.table_sharding, config.train.table_optimizer
    placement, views = choose_placement(config, num_rows, ranks, device), views_together(config, sharding, ranks)
    if sharding != "auto":
        require_room(config, on_fullest_rank(config, sharding, num_rows, ranks, placement), device, placement)
    constraint = ParameterConstraints()
    if sharding != "auto":
        constraint.sharding_types = [ShardingType[sharding.upper()].value]
    elif optimizer == "rowwise_adagrad":  # its state covers a whole row
        constraint.sharding_types = [kind.value for kind in ShardingType if "COLUMN" not in kind.name]
    constraint.compute_kernels = [KERNELS[placement].value]
    if placement == "device":  # replicated tables have TorchRec's dense kernel, in GPU memory
        constraint.compute_kernels.append(EmbeddingComputeKernel.DENSE.value)
    if placement == "uvm_caching":
        constraint.cache_params = CacheParams(load_factor=config.parallel.table_cache_load_factor)
    topology = Topology(
        world_size=ranks,
        compute_device="cuda" if device.is_gpu else "cpu",
        hbm_cap=int(device.memory),
        ddr_cap=int(device.host_memory),
        local_world_size=min(ranks, ranks_per_node),
        hbm_mem_bw=MS * device.memory_bytes_per_s,
        ddr_mem_bw=MS * device.host_memory_bytes_per_s,
        hbm_to_ddr_mem_bw=MS * device.host_link_bytes_per_s,
        intra_host_bw=MS * device.local_bytes_per_s,
        inter_host_bw=MS * device.network_bytes_per_s,
    )
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,
        # What a step needs besides is checked by `launcher plan`, which knows the rest of the model.
        storage_reservation=FixedPercentageStorageReservation(0),
        constraints={stored_name(table, views): constraint for table in range(0, config.model.num_tables, views)},
        debug=False,
    )


def plan_tables(
    collection: torchrec.EmbeddingCollection,
    sharder: EmbeddingCollectionSharder,
    config: Config,
    num_rows: int,
    world: World,
) -> tuple[ShardingPlan, list[TablePlacement]]:
    """TorchRec's plan, made on rank 0, and where it places each table; a collective.

    Raises:
        UserError: see `planner_of`; or the planner finds no place for the tables.
    """
    device, local = device_here(world)
    found: ShardingPlan | UserError | None = None
    if world.rank == 0:
        try:
            planner = planner_of(config, num_rows, world.size, device, local)
            found = planner.plan(collection, [sharder])  # type: ignore[list-item]
        except UserError as error:
            found = error
        except PlannerError as error:
            found = UserError(
                f"parallel.table_sharding={config.parallel.table_sharding}: TorchRec finds no place for "
                f"{config.model.num_tables} tables of {num_rows:,} rows on {world.size} processes: "
                f"{error.error_type.value.replace('_', ' ')}"
            )
    found = world.of_first(found)
    if isinstance(found, UserError):
        raise found
    assert found is not None
    return found, placements_in(found, config, num_rows, world.size, device)


def placements_in(
    plan: ShardingPlan, config: Config, num_rows: int, ranks: int, device: Device
) -> list[TablePlacement]:
    """Where a plan places each of the M tables."""
    placements = []
    views = views_together(config, config.parallel.table_sharding, ranks)
    for table in range(config.model.num_tables):
        entry: Any = plan.plan[""][stored_name(table, views)]  # type: ignore[index]
        shards = entry.sharding_spec.shards if entry.sharding_spec else []
        filled = [shard for shard in shards if 0 not in shard.shard_sizes]
        if filled:
            rows, columns = (max(sizes) for sizes in zip(*(shard.shard_sizes for shard in filled), strict=True))
            parts = Parts(len(shards), rows, columns // views, len({shard.placement.rank() for shard in filled}))
        else:
            parts = Parts(ranks, num_rows, config.model.view_dim, ranks)
        placement = PLACEMENTS.get(entry.compute_kernel, "device")
        placements.append(
            TablePlacement.of(config, table, num_rows, entry.sharding_type, parts, placement, ranks, device.is_gpu)
        )
    return placements
