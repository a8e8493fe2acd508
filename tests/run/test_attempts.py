"""A job that fails twice at the same step on numbers that are not finite goes back one checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mme.config import load_config
from mme.data.dataset import PreparedDataset
from mme.distributed import checkpoint_index as checkpoint
from mme.distributed.checkpoint import remove_all
from mme.distributed.world import World
from mme.errors import FinalError, JobError, NonFiniteError, UserError
from mme.files import sha256_of_blocks
from mme.inference.weights import read_checkpoint
from mme.run.attempts import ATTEMPTS_FILE, forget, go_back, record_failure
from mme.run.preemption import Preemption
from mme.training import Training
from tests.distributed.processes import run_on
from tests.test_train import SMALL, data, records

__all__ = ["data"]  # a fixture
JOB = "hash of the configuration"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
DESCENT = "train.table_optimizer=sgd"


def with_checkpoints(run: Path, *steps: int) -> Path:
    for step in steps:
        folder = checkpoint.folder(run, step)
        folder.mkdir(parents=True)
        (folder / checkpoint.INDEX).write_text(str(step))
    return run


def test_each_failure_after_the_first_goes_back_one_checkpoint(tmp_path: Path) -> None:
    run = with_checkpoints(tmp_path, 7)
    record_failure(run, JOB, resumed_from=7, failed_at=14)
    assert go_back(run, JOB) is None
    with_checkpoints(run, 12, 13)
    record_failure(run, JOB, resumed_from=13, failed_at=14)
    assert go_back(run, JOB) == (
        "warning: step 14 was not finite in 2 attempts: training goes back to the checkpoint of step 12; set aside as "
        "step_N.set_aside: step_13"
    )
    assert checkpoint.steps(run) == [7, 12]
    assert (run / "checkpoints" / "step_13.set_aside" / checkpoint.INDEX).read_text() == "13"

    with_checkpoints(run, 13)  # the third attempt writes it again
    record_failure(run, JOB, resumed_from=12, failed_at=14)
    assert go_back(run, JOB) == (
        "warning: step 14 was not finite in 3 attempts: training goes back to the checkpoint of step 7; set aside as "
        "step_N.set_aside: step_12, step_13"
    )
    assert checkpoint.steps(run) == [7]

    record_failure(run, JOB, resumed_from=7, failed_at=14)
    stuck = go_back(run, JOB)
    assert isinstance(stuck, FinalError)
    assert str(stuck).startswith("step 14 was not finite in 4 attempts, and no older checkpoint is left")
    assert checkpoint.steps(run) == [7]
    assert go_back(run, JOB) is None  # the user can try once more
    assert remove_all(run) == 1
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("second", [("another configuration", 11, 12), (JOB, 11, 13)], ids=["job", "step"])
def test_another_failure_starts_the_count_again(tmp_path: Path, second: tuple[str, int, int]) -> None:
    run = with_checkpoints(tmp_path, 10, 11)
    record_failure(run, JOB, 11, 12)
    record_failure(run, *second)
    assert go_back(run, second[0]) is None
    assert checkpoint.steps(run) == [10, 11]


def test_without_a_checkpoint_there_is_nothing_to_go_back_from(tmp_path: Path) -> None:
    for _ in range(3):
        record_failure(tmp_path, JOB, 0, 12)
    assert go_back(tmp_path, JOB) is None


def test_a_damaged_count_is_no_count(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS_FILE).write_text("{")
    record_failure(tmp_path, JOB, 11, 12)
    assert json.loads((tmp_path / ATTEMPTS_FILE).read_text())["failures"] == 1
    forget(tmp_path)
    forget(tmp_path)
    assert not (tmp_path / ATTEMPTS_FILE).exists()


def attempt(world: World, data: str, run: str, *overrides: str) -> str:
    """A whole training job in this process; the message of the error with which it ends, or ""."""
    config = load_config(QUICKSTART, [f"data.path={data}", f"output_dir={run}", *SMALL, DESCENT, *overrides])
    with Preemption() as preemption:
        try:
            Training(config, PreparedDataset.open(data), world, preemption).run()
        except (JobError, UserError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def attempts_that_overflow(world: World, data: str, run: str) -> list[str]:
    """Gradient descent at a rate of 1e30 leaves weights of 1e28, whose squares and lengths of vectors are infinite.

    Losses stay finite, so the last evaluation finds it, with checkpoints up to step 13 written on the way.
    """
    far = ["train.table_lr=1e30", "train.checkpoint_every=1", "train.eval_every=100"]
    return [attempt(world, data, run, "train.epochs=1"), *(attempt(world, data, run, *far) for _ in range(6))]


def test_a_job_whose_weights_overflow_goes_back_instead_of_resuming_for_ever(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (messages,) = run_on(1, attempts_that_overflow, str(data), str(run))
    spoiled = (
        "NonFiniteError: the item vectors are not finite for 120 of 120 items, the first that of item 0 in table item_0"
    )
    assert messages[0] == ""
    assert [message.startswith(spoiled) for message in messages[1:]] == [True, True, True, True, False, True]
    assert messages[5].startswith("FinalError: step 14 was not finite in 4 attempts, and no older checkpoint is left")
    lines = [line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines()]
    resumed = [line for line in lines if line.startswith("resumed at step")]
    assert resumed == [f"resumed at step {step}" for step in (7, 13, 12, 7, 13)]
    assert [line.split(";")[0] for line in lines if "training goes back" in line] == [
        "warning: step 14 was not finite in 2 attempts: training goes back to the checkpoint of step 12",
        "warning: step 14 was not finite in 3 attempts: training goes back to the checkpoint of step 7",
    ]
    evaluated = [line for line in records(run, "eval") if line["model"] == "fuxi-mme"]
    assert {line["step"] for line in evaluated} == {7}


def overflows_though_steps_are_skipped(world: World, data: str, run: str) -> list[str]:
    often = "train.eval_every=1"
    far = [often, "train.table_lr=1e30", "train.on_non_finite=skip", "train.epochs=2"]
    return [attempt(world, data, run, often, "train.epochs=1"), attempt(world, data, run, *far)]


def test_weights_that_overflow_are_never_best_when_steps_are_skipped(data: Path, tmp_path: Path) -> None:
    """Their gradients were finite, so no step was skipped; the evaluation after it ends the job."""
    run = tmp_path / "run"
    ((finished, overflown),) = run_on(1, overflows_though_steps_are_skipped, str(data), str(run))
    assert finished == "" and overflown.startswith("NonFiniteError: the item vectors are not finite")
    evaluated = [line["step"] for line in records(run, "eval") if line["model"] == "fuxi-mme"]
    assert max(evaluated) == 7 and checkpoint.best_step(run) <= 7


@pytest.mark.slow
def test_a_run_with_nothing_but_nan_is_evaluated_with_status_1(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_on(1, attempt, str(data), str(run), "train.steps=1") == [""]
    (file,) = run.glob("checkpoints/step_1/*.safetensors")
    tensors = load_file(file)
    tensors["tables/item_1@0,0"][5, 3] = torch.nan
    save_file(tensors, file)
    index = file.with_name(checkpoint.INDEX)
    content = json.loads(index.read_text())
    content["files"][0]["sha256"] = sha256_of_blocks(file)
    index.write_text(json.dumps(content))
    failed = subprocess.run(
        [sys.executable, "-m", "mme", "evaluate", "--run", str(run)], capture_output=True, text=True, check=False
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    expected = f"{file}: damaged: piece tables/item_1@0,0 is not finite, first in row 5"
    assert failed.stderr == f"error: {expected}\n"
    with pytest.raises(NonFiniteError, match=re.escape(expected)):
        read_checkpoint(run)
    (refused,) = run_on(1, attempt, str(data), str(run), "train.steps=2")  # it does not start again without a request
    assert refused.startswith(f"UserError: {run}/checkpoints: no sound checkpoint among 1, the newest: {expected}")
