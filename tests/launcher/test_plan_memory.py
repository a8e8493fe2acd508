"""Compares the memory that `plan` predicts for CPU processes with measured training and evaluation, for hundreds of MB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launcher.memory import evaluation_memory, step_memory
from launcher.shape import Shape
from mme.config import Config, load_config
from mme.data.batch import SequenceBatch
from mme.data.dataset import PreparedDataset
from mme.devices import DEVICES
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.evaluation.evaluate import evaluate
from mme.prepare.pipeline import prepare
from mme.prepare.synthetic import prepare_synthetic
from mme.step import TrainStep
from tests.distributed.processes import run_on

STEPS = 3  # the heap reaches its full size within two
WITHIN = 0.15


def configuration(*overrides: str) -> Config:
    model = ["model.embedding_dim=256", "model.moe.num_experts=8", "data.max_seq_len=128"]
    return load_config(None, ["data.path=unused", *model, *overrides])


def memory_bytes(kind: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def full_batch(config: Config, num_items: int, seed: int) -> SequenceBatch:
    """Sequences of full length with uniformly drawn items, as the plan assumes."""
    sequences, length = config.data.batch_size, config.data.max_seq_len
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(num_items, (2, sequences * length), generator=generator)
    gaps = torch.randint(100_000, (sequences, length + 1), generator=generator)
    return SequenceBatch(
        item_ids=items[0],
        seq_offsets=torch.arange(sequences + 1) * length,
        timestamps=gaps.cumsum(1).flatten(),
        target_ids=items[1],
        user_rows=torch.arange(sequences),
    )


def train(world: World, overrides: list[str], num_items: int) -> None:
    config = configuration(*overrides)
    recommender = Recommender(config, num_items, world)
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=STEPS)
    for number in range(STEPS):
        step(number, full_batch(config, num_items, number * world.size + world.rank))


def peak_of_training(world: World, overrides: list[str], num_items: int) -> int:
    """Peak bytes of this rank, above those of the libraries after their first use."""
    train(world, [*overrides, "model.embedding_dim=16", "data.batch_size=2", "data.max_seq_len=8"], 100)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    base = memory_bytes("VmRSS")
    train(world, overrides, num_items)
    return memory_bytes("VmHWM") - base


SHARED = ["loss.negatives=shared", "loss.num_negatives=16"]
SMALL_BATCH = ["data.batch_size=8"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured through Linux's /proc")
@pytest.mark.parametrize(
    "ranks, items, overrides",
    [
        pytest.param(1, 100_000, ["data.batch_size=64", *SHARED], id="activations, experts"),
        pytest.param(1, 20_000, ["data.batch_size=64", "model.num_heads=2", "model.ffn_multiplier=1"], id="negatives"),
        pytest.param(
            1,
            20_000,
            ["data.batch_size=64", "loss.num_negatives=512", "loss.views=each", "model.score_norm=per_view"],
            id="a softmax of each view",
        ),
        pytest.param(
            1,
            300_000,
            ["train.table_optimizer=adagrad", "train.recompute=blocks", "model.num_blocks=4", *SMALL_BATCH, *SHARED],
            id="fused tables, recomputation",
        ),
        pytest.param(2, 300_000, [*SMALL_BATCH, *SHARED], id="tables by rows, Adam"),
        pytest.param(
            2,
            300_000,
            ["train.table_optimizer=dense_adam", *SMALL_BATCH, *SHARED],
            id="tables by rows, Adam of every row",
        ),
        pytest.param(
            2,
            20_000,
            ["data.batch_size=48", "parallel.table_sharding=table_wise", *SHARED],
            id="experts exchanged",
        ),
    ],
)
def test_predicted_memory_is_the_measured_one(ranks: int, items: int, overrides: list[str]) -> None:
    device = DEVICES["cpu"]
    predicted = step_memory(Shape(configuration(*overrides), ranks, ranks, items), device)
    above_libraries = predicted.total - device.runtime
    for rank, measured in enumerate(run_on(ranks, peak_of_training, overrides, items)):
        ratio = above_libraries / measured
        print(f"rank {rank}: measured {measured / 1e6:.0f} MB, predicted / measured {ratio:.3f}")
        assert measured > 250e6, "too small to separate the model from other memory"
        assert abs(ratio - 1) < WITHIN, (
            f"rank {rank}: predicted {above_libraries / 1e6:.0f} MB ({predicted.phase}), measured {measured / 1e6:.0f} MB"
        )


EVALUATED_ITEMS, EVALUATED_USERS = 1_000_000, 1_100
LARGE = ["data.batch_size=8", *SHARED]


def evaluated_set(folder: Path) -> Path:
    """A prepared set in which every item occurs once, so that a million events suffice."""
    items = np.random.default_rng(0).permutation(EVALUATED_ITEMS)
    users = np.arange(items.size) % EVALUATED_USERS
    events = {"user_id": users, "item_id": items, "timestamp": 1_600_000_000 + np.arange(items.size)}
    pq.write_table(pa.table(events), folder / "events.parquet")
    prepare([folder / "events.parquet"], "parquet", folder / "set")
    return folder / "set"


def peak_of_evaluation(world: World, overrides: list[str], data: str, small: str) -> int:
    """Peak bytes of this rank in an evaluation after a step, above those of the libraries after their first use."""

    def run(config: Config, steps: int) -> None:
        dataset = PreparedDataset.open(config.data.path)
        recommender = Recommender(config, dataset.num_items, world)
        step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=STEPS)
        for number in range(steps):
            step(number, full_batch(config, dataset.num_items, number * world.size + world.rank))
        evaluate(recommender, dataset, config, "test", steps)

    tiny = ["model.embedding_dim=16", "data.batch_size=2", "data.max_seq_len=8"]
    run(configuration(*overrides, *tiny, f"data.path={small}"), 1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    base = memory_bytes("VmRSS")
    run(configuration(*overrides, f"data.path={data}"), STEPS)
    return memory_bytes("VmHWM") - base


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured through Linux's /proc")
def test_predicted_memory_of_an_evaluation_is_the_measured_one(tmp_path: Path) -> None:
    data, device = evaluated_set(tmp_path), DEVICES["cpu"]
    prepare_synthetic("quickstart", tmp_path / "small", users=40, items=60)
    for ranks, overrides in ((1, ["model.num_tables=1", "model.moe.num_experts=0"]), (2, [])):
        config = configuration(*LARGE, *overrides)
        predicted = evaluation_memory(Shape(config, ranks, ranks, EVALUATED_ITEMS), device)
        assert predicted.total > step_memory(Shape(config, ranks, ranks, EVALUATED_ITEMS), device).total
        above_libraries = predicted.total - device.runtime
        arguments = [*LARGE, *overrides], str(data), str(tmp_path / "small")
        for rank, measured in enumerate(run_on(ranks, peak_of_evaluation, *arguments)):
            ratio = above_libraries / measured
            print(f"rank {rank} of {ranks}: measured {measured / 1e6:.0f} MB, predicted / measured {ratio:.3f}")
            assert abs(ratio - 1) < WITHIN, predicted.parts
