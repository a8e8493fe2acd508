"""Training stops after evaluations without a higher NDCG@10, and a stopped run counts them on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mme.config import load_config
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import Progress
from mme.errors import UserError
from tests.test_train import data, metrics, train

__all__ = ["data"]  # a fixture
STILL = ["train.lr=1e-12", "train.table_lr=1e-12", "train.eval_every=2"]  # every evaluation gives the same score


def test_evaluations_without_a_higher_score_are_counted() -> None:
    progress = Progress(1, 0, 0, evaluate=True)
    seen = []
    for score in (0.2, 0.2, 0.1, 0.3, None, 0.25):
        progress = progress.evaluated(score)
        seen.append((progress.score, progress.best_score, progress.without_gain))
    assert seen == [(0.2, 0.2, 0), (0.2, 0.2, 1), (0.1, 0.2, 2), (0.3, 0.3, 0), (0.3, 0.3, 0), (0.25, 0.3, 1)]
    assert not progress.evaluate


@pytest.mark.slow
def test_a_run_stops_and_resumes_with_its_count(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = train(
        data, run, *STILL, "train.patience=2", "train.steps=4"
    )  # the second evaluation is the first without
    assert stopped.returncode == 0, stopped.stderr
    done = train(data, run, *STILL, "train.patience=2")
    assert done.returncode == 0, done.stderr
    assert "no higher NDCG@10 in 2 evaluations: stops at step 6" in done.stdout
    assert [line["step"] for line in metrics(run, "valid") if line["model"] != "popularity"] == [2, 4, 6]

    again = train(data, run, *STILL, "train.patience=2")
    assert "training is complete: the checkpoint of step 6 is tested again" in again.stdout
    more = train(data, run, *STILL, "train.patience=3")
    assert "no higher NDCG@10 in 3 evaluations: stops at step 8" in more.stdout


def test_an_evaluation_that_is_made_up_for_stops_the_run_too(data: Path, tmp_path: Path) -> None:
    """A job that was asked to stop during the last evaluation resumes with it, and trains no further step."""
    run = tmp_path / "run"
    assert train(data, run, *STILL, "train.patience=1").returncode == 0
    file = run / "checkpoints/step_4/index.json"
    index = json.loads(file.read_text())
    index["progress"] |= {"evaluate": True, "score": None, "without_gain": 0}
    file.write_text(json.dumps(index))
    again = train(data, run, *STILL, "train.patience=1")
    assert again.returncode == 0, again.stderr
    assert "no higher NDCG@10 in 1 evaluations: stops at step 4" in again.stdout
    assert checkpoint.steps(run) == [2, 4]


def test_patience_needs_a_validation_split() -> None:
    with pytest.raises(UserError, match=r"train.patience \(2\) needs a validation split"):
        load_config(None, ["data.path=unused", "train.patience=2", "data.protocol=leave_one_out"])
