"""Runs, checkpoints and exports that are changed at random give the original model or report, or one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import mme
import mme.cli
from mme.config import load_run_config
from mme.data.dataset import PreparedDataset
from mme.distributed.checkpoint import best_sound, load_weights
from mme.distributed.recommender import Recommender
from mme.distributed.state import weight_pieces
from mme.distributed.world import World
from mme.errors import NonFiniteError, UserError, one_line
from mme.growth.known import known_extent
from mme.run.attempts import forget, go_back, record_failure
from tests.distributed.processes import run_on
from tests.fuzz.bench import CASES, SKIPPED, Bench, in_time
from tests.fuzz.mutations import change_file

HISTORY = [{"item_ids": [3, 17, 4], "timestamps": [1_600_000_000, 1_600_000_600, 1_600_086_400]}]
CHECKPOINT_FILES = ["index.json", "index.json", "rank_00000.safetensors"]

pytestmark = pytest.mark.slow


def load_changed(world: World, trained: Path, cases: Path, mine: Path) -> tuple[int, int]:
    """The numbers of changed checkpoints that were loaded and rejected. A loaded one must equal one of the two bit for bit."""
    config = load_run_config(trained / "run")
    dataset = PreparedDataset.open(config.data.path)
    recommender = Recommender(config, dataset.num_items, world)

    def load(run: Path, step: int | None) -> tuple[int, dict[str, torch.Tensor]]:
        index = best_sound(run, step, world, notes.append)
        assert known_extent(index.progress, run, dataset.folder, dataset.info, config.model) == dataset.extent([])
        load_weights(run, index, recommender)
        return index.progress.step, {piece.name: piece.read().clone() for piece in weight_pieces(recommender)}

    notes: list[str] = []
    sound = dict(load(trained / "run", step) for step in (2, 4))
    loaded = 0
    for seed, number in CASES:
        rng, run = random.Random(f"checkpoint/{seed}/{number}"), cases / f"seed{seed}-case{number}"
        shutil.copytree(trained / "run" / "checkpoints", run / "checkpoints")
        for changed in rng.choice([["step_2"], ["step_4"], ["step_2", "step_4"]]):
            change_file(rng, run / "checkpoints" / changed / rng.choice(CHECKPOINT_FILES), mine)
        try:
            with in_time():
                step, weights = load(run, None)
            assert all(torch.equal(weights[name], sound[step][name]) for name in weights), run
            loaded += 1
        except (UserError, NonFiniteError) as error:
            assert str(error), run
        shutil.rmtree(run)
    assert all(note.startswith(SKIPPED) and "\n" not in one_line(note) for note in notes)
    return loaded, len(CASES) - loaded


def test_checkpoint(tmp_path: Path, trained: Path) -> None:
    mine = tmp_path / "mine" / "canary"
    mine.parent.mkdir()
    mine.write_text("mine")
    ((loaded, refused),) = run_on(1, load_changed, trained, tmp_path / "cases", mine)
    print(f"test_checkpoint: {loaded} succeeded, {refused} refused")
    assert len(CASES) < 50 or (loaded and refused)
    assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 1


def recommended(path: Path) -> tuple[str, pa.Table]:
    """The step of the model at ``path``, and its list."""
    model = mme.load(path, device="cpu")
    return model.name.rpartition("@")[2], model.recommend(HISTORY, k=7)


def test_model_of_a_run(bench: Bench, trained: Path) -> None:
    """Reads a run and its data set as `mme serve`, `mme export` and `mme.load` do."""
    sound = {
        step: mme.load(trained / "run", "cpu", int(step[5:])).recommend(HISTORY, k=7) for step in ("step_2", "step_4")
    }
    config = (trained / "run" / "config.yaml").read_text()
    for rng, case in bench.cases():
        run, data = case / "run", case / "data"
        shutil.copytree(trained / "run" / "checkpoints", run / "checkpoints")
        shutil.copytree(trained / "data", data, ignore=shutil.ignore_patterns(".cache"))
        (run / "config.yaml").write_text(config.replace(str(trained / "data"), str(data)))
        places = [data / "dataset.json", data / "items.parquet", run / "config.yaml"]
        places += [run / "checkpoints" / step / rng.choice(CHECKPOINT_FILES) for step in sound]
        changed = rng.choice(places)
        change_file(rng, changed, bench.mine)
        found = bench.call(recommended, run)
        # Another configuration may be another model.
        assert found is None or changed.name == "config.yaml" or found[1].equals(sound[found[0]]), case


def test_export(bench: Bench, trained: Path) -> None:
    original = bench.folder / "model.safetensors"
    command = ["export", "--run", str(trained / "run"), "--what", "weights", "--output", str(original)]
    assert mme.cli.main(command) == 0
    _, expected = recommended(original)
    for rng, case in bench.cases():
        shutil.copy(original, case / "model.safetensors")
        change_file(rng, case / "model.safetensors", bench.mine)
        found = bench.call(recommended, case / "model.safetensors")
        assert found is None or found[1].equals(expected), case


def test_report(bench: Bench, trained: Path) -> None:
    """The other files of a run that the report reads or replaces."""
    for rng, case in bench.cases():
        shutil.copytree(trained / "run", case / "run", ignore=shutil.ignore_patterns("checkpoints"))
        name = rng.choice(["metrics.jsonl", "metrics.jsonl", "config.yaml", "log.txt", "report.html"])
        change_file(rng, case / "run" / name, bench.mine)
        if bench.run(mme.cli.main, "report", "--run", case / "run"):
            assert (case / "run" / "report.html").read_text().lower().startswith("<!doctype html>")


def test_compared_ranks(bench: Bench, trained: Path) -> None:
    first = trained / "run"
    for rng, case in bench.cases():
        second = case / "run"
        shutil.copytree(first, second, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        change_file(rng, second / "test_ranks.parquet", bench.mine)
        if bench.run(mme.cli.main, "compare", first, second, "--format", "csv"):
            values = [line.split(",")[4] for line in bench.out.splitlines()[1:]]
            assert np.isfinite([float(value) for value in values]).all(), case


def test_attempts(bench: Bench, trained: Path) -> None:
    for rng, case in bench.cases():
        run = case / "run"
        shutil.copytree(trained / "run" / "checkpoints", run / "checkpoints")
        for _ in range(2):
            record_failure(run, "job", resumed_from=4, failed_at=5)
        change_file(rng, run / "attempts.json", bench.mine)
        with in_time():
            went_back = isinstance(go_back(run, "job"), str)
        left = {path.name for path in (run / "checkpoints").iterdir()}
        assert left == {"step_2", "step_4"} or (went_back and left == {"step_2", "step_4.set_aside"}), case
        bench.succeeded += went_back
        bench.refused += not went_back
        forget(run)
        record_failure(run, "job", resumed_from=2, failed_at=3)
        assert json.loads((run / "attempts.json").read_text())["failures"] == 1, case
