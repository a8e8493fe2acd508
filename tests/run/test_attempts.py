"""A job that fails twice at the same step on numbers that are not finite goes back one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mme.distributed import checkpoint_index as checkpoint
from mme.run.attempts import FILE, forget, go_back, record_failure
from tests.test_train import data

__all__ = ["data"]  # a fixture
JOB = "hash of the configuration"


def with_checkpoints(run: Path, *steps: int) -> Path:
    for step in steps:
        folder = checkpoint.folder(run, step)
        folder.mkdir(parents=True)
        (folder / checkpoint.INDEX).write_text(str(step))
    return run


def test_two_failures_at_one_step_set_the_newest_checkpoint_aside(tmp_path: Path) -> None:
    run = with_checkpoints(tmp_path, 10, 11)
    record_failure(run, JOB, resumed_from=11, failed_at=12)
    assert go_back(run, JOB) is None
    record_failure(run, JOB, resumed_from=11, failed_at=12)
    assert go_back(run, JOB) == (
        "warning: step 12 was not finite in 2 attempts from the checkpoint of step 11: that one is set aside as "
        "step_11.set_aside, and training goes back to step 10"
    )
    assert checkpoint.steps(run) == [10]
    assert (run / "checkpoints" / "step_11.set_aside" / checkpoint.INDEX).read_text() == "11"
    assert go_back(run, JOB) is None  # the count starts again


@pytest.mark.parametrize(
    "second", [("another configuration", 11, 12), (JOB, 10, 12), (JOB, 11, 13)], ids=["job", "checkpoint", "step"]
)
def test_another_failure_starts_the_count_again(tmp_path: Path, second: tuple[str, int, int]) -> None:
    run = with_checkpoints(tmp_path, 10, 11)
    record_failure(run, JOB, 11, 12)
    record_failure(run, *second)
    assert go_back(run, second[0]) is None
    assert checkpoint.steps(run) == [10, 11]


def test_the_only_checkpoint_stays(tmp_path: Path) -> None:
    run = with_checkpoints(tmp_path, 11)
    for _ in range(3):
        record_failure(run, JOB, 11, 12)
    assert go_back(run, JOB) is None
    assert checkpoint.steps(run) == [11]


def test_a_damaged_count_is_no_count(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    record_failure(tmp_path, JOB, 11, 12)
    assert json.loads((tmp_path / FILE).read_text())["failures"] == 1
    forget(tmp_path)
    forget(tmp_path)
    assert not (tmp_path / FILE).exists()
