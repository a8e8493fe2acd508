"""Item tables in 16 bits: their steps, their checkpoints, and what a device lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mme.config import load_config
from mme.devices import DEVICES
from mme.distributed.checkpoint import load_training
from mme.distributed.checkpoint_index import Index, Progress, read_index
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.errors import UserError
from mme.step import TrainStep
from mme.table_placement import predict
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration, one_step, sequences, whole

HALF = "parallel.table_dtype=float16"
DENSE = "model.moe.num_experts=0"  # the choice of experts may change with the last bit


def test_a_step_agrees_within_the_rounding_of_the_weights() -> None:
    """float16 has 11 bits, and its values are spaced by 2**-10 of a power of two."""
    ((loss, _, start),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], ["train.table_lr=1e-30", DENSE])
    ((_, _, exact),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], [DENSE])
    results = run_on(2, one_step, [[0, 3], [1, 2, 4]], [HALF, DENSE])
    assert results[0][0] == results[1][0] == pytest.approx(loss, rel=2e-3)
    weights, before, after = whole([parts for _, _, parts in results]), whole([start]), whole([exact])
    for name in ("tables/item_0", "tables/item_1"):
        assert weights[name].dtype == torch.float32  # as in a checkpoint
        assert torch.equal(weights[name], weights[name].half().float())
        assert (weights[name] - after[name]).norm() < 0.02 * (after[name] - before[name]).norm(), name


def losses(world: World, run: Path, overrides: list[str]) -> tuple[list[float], list[float]]:
    """The losses of two steps, and of the second one after it was resumed from a checkpoint of the first."""
    config = configuration("train.table_optimizer=rowwise_adagrad", "train.table_lr=0.1", *overrides)
    batch = sequences([[0, 3], [1, 2, 4]][world.rank] if world.size > 1 else [0, 1, 2, 3, 4])

    def build() -> tuple[Recommender, Any, TrainStep]:
        recommender = Recommender(config, NUM_ITEMS, world)
        engine = initialize_engine(recommender.decoder, config)
        return recommender, engine, TrainStep(config, recommender, engine, total_steps=3)

    recommender, _, step = build()
    found = [step(0, batch).loss]
    with CheckpointWriter(run, recommender, keep=1) as writer:
        writer.save(Progress(1, 0, 0))
    found.append(step(1, batch).loss)
    index = read_index(run, 1)
    assert isinstance(index, Index)
    recommender, engine, step = build()
    load_training(run, index, recommender, engine)
    return found, [step(1, batch).loss]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_has_the_same_bits(processes: int, tmp_path: Path) -> None:
    for uninterrupted, resumed in run_on(processes, losses, tmp_path, [HALF]):
        assert uninterrupted[0] != uninterrupted[1] == resumed[0]


def refused(world: World, cases: list[list[str]]) -> list[str]:
    found = []
    for overrides in cases:
        try:
            Recommender(configuration(*overrides), NUM_ITEMS, world)
        except UserError as error:
            found.append(str(error))
    return found


def test_what_a_cpu_lacks_is_rejected_in_one_line() -> None:
    cases = [["parallel.table_dtype=bfloat16"], [HALF, "train.table_optimizer=adam"]]
    for brain, adam in run_on(2, refused, cases):
        assert brain == "parallel.table_dtype=bfloat16: on a CPU FBGEMM has float32 and float16: expected one of them"
        assert adam == (
            "parallel.table_dtype=float16: on a CPU train.table_optimizer=adam updates only float32: expected float32, or "
            "adagrad, rowwise_adagrad or sgd"
        )


@pytest.mark.parametrize(
    "overrides",
    [
        [HALF, "parallel.table_sharding=data_parallel"],
        [HALF, "train.table_optimizer=dense_adam"],
        ["parallel.table_dtype=bfloat16", "parallel.table_placement=uvm_caching"],
    ],
)
def test_what_no_device_has_is_rejected(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"parallel\.table_dtype=\w+(:| needs)"):
        load_config(None, ["data.path=unused", *overrides])


def test_weights_take_half_the_bytes_and_states_as_many() -> None:
    whole_, half = (
        predict(configuration("train.table_optimizer=adam", *more), 10**6, 8, DEVICES["h100-80g"])[0]
        for more in ([], [HALF])
    )
    assert whole_.device_bytes == 125_000 * 8 * (4 + 8)
    assert half.device_bytes == 125_000 * 8 * (2 + 8)
