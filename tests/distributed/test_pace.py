"""The wait of ranks for each other is measured, and the slowest rank is named."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mme.config import Config
from mme.devices import peak_flops
from mme.distributed.pace import Pace
from mme.distributed.world import World
from mme.flops import training_flops
from tests.distributed.processes import run_on
from tests.distributed.test_step import LENGTHS, NUM_ITEMS, configuration, sequences
from tests.test_train import data, records, train

__all__ = ["data"]  # a fixture
SLEEP_S = 0.5


def steps_with_a_slow_rank(world: World) -> tuple[dict[str, float], float, bool]:
    wait = dist.Work.wait
    with Pace(world, Config(), num_items=1, peak=None) as pace:
        time.sleep(SLEEP_S * world.rank)
        world.barrier()  # belongs to no step
        for _ in range(2):
            pace.begin_step()
            time.sleep(SLEEP_S * (world.rank == 1))
            world.sum(torch.ones(1))
            step_s = pace.end_step()
        found = pace.over_ranks()
        pace.begin_step()
        step_s = pace.end_step()
        assert pace.over_ranks()["wait_ms"] < found["wait_ms"]  # counted once
    return found, step_s, dist.Work.wait is wait


def test_the_slowest_rank_is_named_and_the_others_wait_for_it() -> None:
    results = run_on(2, steps_with_a_slow_rank)
    for found, _, restored in results:
        assert found == results[0][0]
        assert found["slowest_rank"] == 1
        # Rank 0 waits as long as rank 1 sleeps and rank 1 hardly waits, so the mean wait is half of the sleep.
        assert found["wait_ms"] > 400 * SLEEP_S
        assert found["straggler_ms"] > 400 * SLEEP_S
        assert 0.25 < found["exposed_communication"] < 0.75
        assert "mfu" not in found  # the peak is unknown
        assert restored


def use_of_devices(world: World, peak: float) -> tuple[dict[str, float], float]:
    """The figures of two steps on five sequences in all, and the mean seconds of a rank."""
    config = configuration()
    pace = Pace(world, config, NUM_ITEMS, peak)
    batch = sequences([[0, 3], [1, 2, 4]][world.rank] if world.size == 2 else [0, 1, 2, 3, 4])
    seconds = 0.0
    with pace:
        for _ in range(2):
            pace.begin_step()
            pace.count(batch)
            time.sleep(0.2)
            seconds += pace.end_step()
        found = pace.over_ranks()
    return found, float(world.sum(torch.tensor(seconds, dtype=torch.float64))) / world.size


@pytest.mark.parametrize("size", [1, 2])
def test_utilisation_is_that_of_the_counted_flops(size: int) -> None:
    peak = 1e9
    pairs = sum(length * (length + 1) // 2 for length in LENGTHS)
    flops = 2 * sum(training_flops(configuration(), sum(LENGTHS), pairs, NUM_ITEMS).values())
    for found, seconds in run_on(size, use_of_devices, peak):
        assert found["mfu"] == pytest.approx(flops / (seconds * size * peak), rel=1e-2, abs=1e-4)
        assert 0.05 < found["peak_mem_gib"] < 8  # resident memory of a process that has loaded PyTorch
        assert ("wait_ms" in found) == (size > 1)


def test_counting_reads_no_value_of_a_batch() -> None:
    """The host would wait for the device. A tensor on the meta device has no values, so reading one raises."""
    pace = Pace(World.alone(torch.device("cpu")), configuration(), NUM_ITEMS, peak=1e9)
    pace.count(sequences([0, 3]).to(torch.device("meta")))


@pytest.mark.slow
def test_a_run_records_and_shows_waits(data: Path, tmp_path: Path) -> None:
    done = train(data, tmp_path / "run", "train.steps=4", "train.log_every=2", processes=2)
    assert done.returncode == 0, done.stderr
    lines = records(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 0 < line["exposed_communication"] < 1 and line["peak_mem_gib"] > 0.1 and "mfu" not in line
        assert line["wait_ms"] > 0 and line["straggler_ms"] >= 0 and line["slowest_rank"] in (0, 1)
    assert re.search(r"tokens/s  \d+\.\d GiB  waits \d+%", (tmp_path / "run" / "log.txt").read_text())
    assert "waiting in collectives" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),  # TF32
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA H100 PCIe", "bfloat16", None),  # slower than the one listed
        ("Tesla T4", "bfloat16", None),
    ],
)
def test_only_listed_gpus_have_a_peak(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak
