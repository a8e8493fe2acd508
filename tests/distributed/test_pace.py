"""The wait of ranks for each other is measured, and the slowest rank is named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mme.distributed.pace import Pace
from mme.distributed.world import World
from tests.distributed.processes import run_on
from tests.test_train import data, records, train

__all__ = ["data"]  # a fixture
SLEEP_S = 0.5


def steps_with_a_slow_rank(world: World) -> tuple[dict[str, float], float, bool]:
    wait = dist.Work.wait
    with Pace(world) as pace:
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
        assert restored


@pytest.mark.slow
def test_a_run_records_and_shows_waits(data: Path, tmp_path: Path) -> None:
    done = train(data, tmp_path / "run", "train.steps=4", "train.log_every=2", processes=2)
    assert done.returncode == 0, done.stderr
    lines = records(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["wait_ms"] > 0 and line["straggler_ms"] >= 0 and line["slowest_rank"] in (0, 1)
    assert "waiting in collectives" in (tmp_path / "run" / "report.html").read_text()
