"""A run resumes after its data set has grown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mme.data.dataset import PreparedDataset
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import INDEX, best_step, read_index
from mme.prepare.pipeline import add_events
from mme.run.metrics_file import METRICS_FILE, read_metrics
from tests.distributed.processes import run_on
from tests.distributed.test_step import whole
from tests.growth.days import events_of, files_of, first_day, refused, saved, train, write
from tests.trained import mme as command

DAYS = 7


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_resumes_with_a_set_that_has_grown(tmp_path: Path, processes: int) -> None:
    data, run = first_day(tmp_path), tmp_path / "run"
    first = run_on(1, train, str(data), str(run))[0]
    steps = len(first["steps"])
    before, old = saved(run, steps), PreparedDataset.open(data)
    number, actions = old.num_items, old.info["features"]["action"]
    add_events([write(tmp_path / "day1.csv", events_of(1))], data)
    results = run_on(processes, train, str(data), str(run), "train.epochs=2", "data.batch_size=8")
    now = PreparedDataset.open(data)
    assert now.num_items > number
    begin = whole([result["begin"] for result in results])
    assert results[0]["steps"][0] == steps  # its steps are kept
    for name, value in before.items():
        if not name.startswith("tables/"):
            torch.testing.assert_close(begin[name], value, rtol=0, atol=0)
            continue
        assert begin[name].shape[0] == now.num_items + now.info["features"]["action"] + 1
        assert torch.equal(begin[name][:number], value[:number])
        assert torch.equal(begin[name][now.num_items :][: actions + 1], value[number:])
        new = torch.cat([begin[name][number : now.num_items], begin[name][now.num_items + actions + 1 :]])
        if "exp_avg" in name:
            assert not new.any()
        else:
            mean = value[:number].double().mean(0).float()
            torch.testing.assert_close(new[: now.num_items - number], mean.expand(now.num_items - number, -1))
    added = now.num_items - number
    assert f"has grown since step {steps}: {added} of {now.num_items} items and 1 of" in results[0]["log"]
    assert checkpoint.steps(run)[0] <= steps  # the checkpoint of the first day is still there
    # Its score, on a smaller set, does not count, however high it is.
    index = json.loads((checkpoint.folder(run, steps) / INDEX).read_text())
    index["progress"]["score"] = 1.0
    (checkpoint.folder(run, steps) / INDEX).write_text(json.dumps(index))
    assert best_step(run) > steps


def test_a_set_that_does_not_continue_the_run_is_refused_in_one_line(tmp_path: Path) -> None:
    days = [write(tmp_path / f"day{day}.csv", events_of(day)) for day in (1, 2)]
    shrunken = first_day(tmp_path)
    data, run, grown = tmp_path / "data", tmp_path / "run", tmp_path / "grown"
    shutil.copytree(shrunken, data)
    add_events(days[:1], data)
    run_on(1, train, str(data), str(run))
    before = files_of(run)
    shutil.copytree(data, grown)
    add_events(days[1:], grown)
    renumbered = first_day(tmp_path, first_item=2)
    for day in days:
        add_events([day], renumbered)
    expected = {
        str(shrunken): f"was trained on a data set that is neither data.path={shrunken} nor an earlier state of it",
        str(renumbered): f"was trained on a data set that is neither data.path={renumbered} nor an earlier state of it",
        str(grown): "no step is left to train on it: expected more than train.epochs=1",
    }
    (lines,) = run_on(1, refused, [(path, str(run), []) for path in expected])
    for line, message in zip(lines, expected.values(), strict=True):
        assert message in line and "\n" not in line
    assert before == files_of(run)


@pytest.mark.slow
def test_seven_days_one_after_another(tmp_path: Path) -> None:
    """One epoch per day on a growing set, compared with as many steps on the whole set, which sees more events."""
    data, run = first_day(tmp_path), tmp_path / "run"
    for day in range(DAYS):
        if day:
            add_events([write(tmp_path / f"day{day}.csv", events_of(day))], data)
        (result,) = run_on(1, train, str(data), str(run), f"train.epochs={day + 1}")
        if day:
            assert "has grown since step" in result["log"]
    together = tmp_path / "together"
    run_on(1, train, str(data), str(together), f"train.epochs={DAYS}")
    index = read_index(run, checkpoint.steps(run)[-1])
    assert not isinstance(index, str) and index.progress.epoch == DAYS
    first, *_, last = losses_of(run)
    assert last < 0.7 * first
    assert ndcg_of(run) > 0.6 * ndcg_of(together)
    for step in (checkpoint.steps(run)[0], index.progress.step):  # of a smaller set, and of the set as it is
        found = json.loads(command("evaluate", "--run", run, "--checkpoint", str(step)).stdout)
        assert found["checkpoint"] == step and found["users"] > 0


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / METRICS_FILE) if line["kind"] == "train"]


def ndcg_of(run: Path) -> float:
    """On the test split, at the end of training."""
    found = [line for line in read_metrics(run / METRICS_FILE) if line.get("split") == "test"]
    return [line["ndcg@10"] for line in found if line["model"] == "fuxi-mme"][-1]
