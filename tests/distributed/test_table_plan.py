"""TorchRec's planner is told the truth, and its plan is the one that `launcher plan` predicts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.distributed.embedding import EmbeddingCollectionSharder

from mme.config import Config, load_config
from mme.devices import DEVICES
from mme.distributed.checkpoint import load_training, load_weights
from mme.distributed.checkpoint_index import Index, Progress, read_index
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.table_plan import item_collection, placements_in, planner_of, stored_name
from mme.distributed.tables import ItemTables
from mme.distributed.world import World
from mme.errors import UserError
from mme.table_placement import bytes_of, parts_of, predict, views_together
from tests.distributed.processes import run_on
from tests.distributed.test_step import configuration as small

H100 = DEVICES["h100-80g"]
TABLES = 4


def configuration(*overrides: str) -> Config:
    model = [f"model.num_tables={TABLES}", "model.embedding_dim=1024", "model.moe.num_experts=0"]
    return load_config(None, ["data.path=unused", *model, *overrides])


def planned(config: Config, rows: int, ranks: int) -> tuple[Any, dict[str, Any]]:
    """TorchRec's plan, and its estimates by table."""
    planner = planner_of(config, rows, ranks, H100, 8)
    views = views_together(config, config.parallel.table_sharding, ranks)
    plan = planner.plan(item_collection(config, rows, views), [EmbeddingCollectionSharder()])
    assert planner._best_plan is not None
    options = {option.name: option for option in planner._best_plan}
    return plan, {f"item_{table}": options[stored_name(table, views)] for table in range(config.model.num_tables)}


CASES = [
    *itertools.product((8, 64), ("row_wise", "column_wise", "table_wise"), ("device", "uvm", "uvm_caching"), ("adam",)),
    *itertools.product((8, 64), ("row_wise", "table_wise"), ("device", "uvm", "uvm_caching"), ("rowwise_adagrad",)),
    (8, "data_parallel", "device", "adam"),
    (1024, "row_wise", "device", "adam"),
    (1024, "row_wise", "uvm_caching", "adagrad"),
    (1024, "table_wise", "uvm", "adam"),
]


@pytest.mark.parametrize(("ranks", "sharding", "placement", "optimizer"), CASES)
def test_the_plan_is_torchrec_s_table_by_table(ranks: int, sharding: str, placement: str, optimizer: str) -> None:
    rows = 100_000 * ranks if sharding == "row_wise" else 3_000_000
    config = configuration(
        f"parallel.table_sharding={sharding}",
        f"parallel.table_placement={placement}",
        f"train.table_optimizer={optimizer}",
    )
    plan, options = planned(config, rows, ranks)
    predicted = predict(config, rows, ranks, H100)
    assert placements_in(plan, config, rows, ranks, H100) == predicted
    parts = parts_of(config, sharding, rows, ranks)
    views = views_together(config, sharding, ranks)
    ours = bytes_of(config, parts.rows, parts.columns, placement, views).times(views)  # of a stored table
    states_in_cache = 0.0
    if placement == "uvm_caching" and optimizer != "rowwise_adagrad":
        # TorchRec counts states of cached rows in GPU memory too; FBGEMM's cache holds only weights.
        states_in_cache = config.parallel.table_cache_load_factor * ours.host_states
    for table in predicted:
        largest = max(options[table.table].shards, key=lambda shard: shard.storage.hbm + shard.storage.ddr).storage
        assert largest.hbm + largest.ddr == pytest.approx(ours.device + ours.host + states_in_cache, rel=0.05)
        if (
            optimizer != "rowwise_adagrad"
        ):  # whose state TorchRec counts beside the weights, and FBGEMM keeps on the GPU
            assert largest.ddr == pytest.approx(ours.host, rel=0.05, abs=1)
            assert largest.hbm == pytest.approx(ours.device + states_in_cache, rel=0.05, abs=2e6)


@pytest.mark.parametrize("rows", [1_000_000_000, 1_500_000_000])
def test_no_table_goes_to_host_memory_in_silence(rows: int) -> None:
    """TorchRec's defaults, 32 GiB of memory on every GPU, put one and three of these four tables into host memory."""
    config = load_config(
        None,
        ["data.path=unused", "model.num_tables=4", "model.embedding_dim=64", "train.table_optimizer=adagrad"],
    )
    ranks = 16
    plan, _ = planned(config, rows, ranks)
    found = placements_in(plan, config, rows, ranks, H100)
    assert {table.placement for table in found} == {"device"}
    assert found == predict(config, rows, ranks, H100)


@pytest.mark.parametrize("placement", ["device", "uvm", "uvm_caching"])
def test_a_sharding_that_torchrec_chooses_keeps_the_placement(placement: str) -> None:
    config = configuration("parallel.table_sharding=auto", f"parallel.table_placement={placement}")
    plan, _ = planned(config, 10_000, 8)
    assert {table.placement for table in placements_in(plan, config, 10_000, 8, H100)} == {placement}


def test_the_planner_knows_the_hardware() -> None:
    topology = planner_of(configuration(), 1000, 64, H100, 8)._topology
    assert topology.local_world_size == 8
    assert {device.storage.hbm for device in topology.devices} == {int(H100.memory)}
    assert {device.storage.ddr for device in topology.devices} == {int(H100.host_memory)}
    assert topology.hbm_mem_bw == pytest.approx(3.35e9)  # bytes per millisecond
    assert topology.hbm_to_ddr_mem_bw == pytest.approx(64e6)
    assert (topology.intra_host_bw, topology.inter_host_bw) == (pytest.approx(450e6), pytest.approx(50e6))


def placements(world: World, overrides: list[str]) -> Any:
    try:
        return ItemTables(small(*overrides), 40, world).placements
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "data_parallel"])
def test_a_job_s_tables_are_where_the_plan_says(sharding: str) -> None:
    overrides = [f"parallel.table_sharding={sharding}", "train.table_optimizer=adam"]
    expected = predict(small(*overrides), 40, 2, DEVICES["cpu"])
    assert run_on(2, placements, overrides) == [expected, expected]


def test_a_job_on_cpus_rejects_host_memory_in_one_line() -> None:
    for line in run_on(2, placements, ["parallel.table_placement=uvm_caching"]):
        assert line == (
            "parallel.table_placement=uvm_caching needs a GPU, and the processes run on a CPU: expected auto or device"
        )


def test_a_loaded_checkpoint_clears_the_cache(tmp_path: Path) -> None:
    """Rows that the cache holds would hide those of the checkpoint, and a flush would overwrite them."""
    ((before, loaded, resumed),) = run_on(1, cached_rows, tmp_path)
    assert before == [7, 7]
    assert loaded == resumed == [-1, -1]


def cached_rows(world: World, run: Path) -> list[list[int]]:
    """The ids in the cache before and after the weights are loaded, and after training is resumed.

    FBGEMM has caches on GPUs only: its CPU tables get the state of a cache that holds rows, and a flush that does nothing.
    """
    config = small("train.table_optimizer=adagrad")
    recommender = Recommender(config, 40, world)
    engine = initialize_engine(recommender.decoder, config)
    with CheckpointWriter(run, recommender, keep=1) as writer:
        writer.save(Progress(0, 0, 0))
    index = read_index(run, 0)
    assert isinstance(index, Index)
    (lookup,) = recommender.tables.model.module._lookups
    (module,) = (found for found in lookup.modules() if isinstance(found, SplitTableBatchedEmbeddingBagsCodegen))
    module.lxu_cache_weights, module.lxu_state, module.flush = torch.zeros(2, 8), torch.ones(2), lambda: None
    found = []
    for load in (
        lambda: None,
        lambda: load_weights(run, index, recommender),
        lambda: load_training(run, index, recommender, engine),
    ):
        module.lxu_cache_state = torch.full((2,), 7)
        load()
        found.append(module.lxu_cache_state.tolist())
    return found
