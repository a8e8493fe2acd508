"""Ranks that were started with different jobs all end with the same line, which names the difference."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from mme.config import Config, load_config
from mme.distributed.world import World
from mme.errors import UserError
from mme.run.same_job import TOKEN_FILE, require_same_job, require_shared_folder
from tests.distributed.processes import run_on


def configuration(*overrides: str) -> Config:
    return load_config(None, ["data.path=data", "output_dir=run", *overrides])


def refusal_of_another_job(world: World, overrides: list[str], dataset: str) -> str:
    """The messages of all ranks if the last one has ``overrides`` and ``dataset``."""
    is_other = world.rank == world.size - 1
    with pytest.raises(UserError) as refused:
        require_same_job(configuration(*(overrides if is_other else [])), dataset if is_other else "first", world)
    return str(refused.value)


def compare_jobs(world: World, run: str) -> list[str]:
    require_same_job(configuration("train.lr=0.5"), "first", world)  # the same on all: nothing happens
    said = [
        refusal_of_another_job(world, ["train.lr=0.04"], "first"),
        refusal_of_another_job(world, ["output_dir=elsewhere"], "first"),
        refusal_of_another_job(world, [], "second"),
    ]
    shared, own = Path(run), Path(run) / f"of_rank_{world.rank}"
    own.mkdir()
    require_shared_folder(shared, world, patience_s=0.5)
    world.barrier()  # rank 0 has removed it
    assert not (shared / TOKEN_FILE).exists()
    with pytest.raises(UserError) as refused:
        require_shared_folder(own, world, patience_s=0.5)
    return [*said, str(refused.value).replace(str(own), "OWN")]


def test_ranks_of_different_jobs_name_the_key_that_differs(tmp_path: Path) -> None:
    first, second = run_on(2, compare_jobs, str(tmp_path))
    assert first == second
    host = platform.node()

    def line(key: str, other: object, mine: object) -> str:
        return (
            f"the ranks don't run the same job: {key} is {other} on rank 1 ({host}) and {mine} on rank 0 ({host}): "
            "expected the same configuration and data on every node"
        )

    assert first == [
        line("train.lr", 0.04, 0.001),
        line("output_dir", "elsewhere", "run"),
        line("the SHA-256 of the data set in data.path", "second", "first"),
        f"output_dir OWN: rank 1 ({host}) doesn't see what rank 0 writes there: expected one folder that all nodes share",
    ]
    assert not (tmp_path / "of_rank_0" / TOKEN_FILE).exists()
