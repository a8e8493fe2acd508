"""The hanging rank is named, wherever the others wait, and the stacks of all ranks are kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

from mme.distributed.world import World, process_group
from mme.run.watchdog import COLLECTIVES, COLLECTIVES_JSON, Watchdog, record_collectives
from tests.distributed.processes import run_on
from tests.ports import free_port


def work(rank: int, port: int, run: Path, hanging: str) -> None:
    """Two ranks do three steps; before the third, rank 1 hangs."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    record_collectives()
    with process_group() as world, Watchdog(run, world, timeout_s=3) as watchdog:
        for step in range(3):
            if step == 2 and rank == 1 and hanging == "between steps":
                fall_asleep()
            watchdog.beat(f"training step {step}")
            if step == 2 and rank == 1:
                fall_asleep()
            world.sum(torch.ones(1))


def fall_asleep() -> None:
    time.sleep(600)


@pytest.mark.parametrize(
    ("hanging", "doing"), [("between steps", "training step 1"), ("within a step", "training step 2")]
)
def test_the_rank_that_hangs_is_named(tmp_path: Path, hanging: str, doing: str) -> None:
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=work, args=(rank, port, tmp_path, hanging)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 1
    line = f"error: rank 1 hangs (while {doing}): no progress for 3 s; the ranks' stacks and last collectives are in {tmp_path}/stacks\n"
    for log in ("log.txt", "log.rank1.txt"):
        assert (tmp_path / log).read_text().endswith(line)
    assert "fall_asleep" in (tmp_path / "stacks" / "rank_1.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    check_last_collectives(tmp_path / "stacks")


def check_last_collectives(stacks: Path) -> None:
    """Only rank 0 has joined the third sum, according to both forms of the record."""
    for rank, number in enumerate((3, 2)):
        readable = json.loads((stacks / COLLECTIVES_JSON.format(rank)).read_text())["entries"]
        with_frames = pickle.loads((stacks / COLLECTIVES.format(rank)).read_bytes())["entries"]
        for entries in (readable, with_frames):
            assert sum(entry["profiling_name"] == "gloo:all_reduce" for entry in entries) == number
        assert any(frame["name"] == "work" for frame in with_frames[-1]["frames"])


def leave_nothing_of_its_own(world: World, run: str) -> None:
    with Watchdog(Path(run), world, timeout_s=5):
        pass


def test_the_next_attempt_keeps_the_stacks_of_a_hang(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    (stacks / "rank_0.txt").write_text("where it hung")
    run_on(1, leave_nothing_of_its_own, str(tmp_path))
    (kept,) = stacks.iterdir()
    assert kept.read_text() == "where it hung"


def get_on(world: World, run: str) -> list[str]:
    """Beats for longer than the watchdog waits, which looks once a second."""
    with Watchdog(Path(run), world, timeout_s=5) as watchdog:
        for step in range(16):
            watchdog.beat(f"training step {step}")
            time.sleep(0.5)
    return [path.name for path in Path(run).iterdir()]


def test_a_rank_that_gets_on_is_left_alone_and_leaves_nothing(tmp_path: Path) -> None:
    assert run_on(1, get_on, str(tmp_path)) == [[]]
