"""Files changed at random end a command with a result that is right, or with one line; never with anything else.

Seed and number of changes come from the environment: MME_FUZZ_SEED (0) and MME_FUZZ_CASES (100 of each kind). A failure
names its seed and case; the changed files are left in pytest's temporary folder.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import launcher.__main__
import mme.cli
from mme.config import flat, load_config, load_run_config
from mme.data.dataset import PreparedDataset
from mme.data.description import content_sha256
from mme.data.split import Split
from mme.distributed.checkpoint import load_weights
from mme.distributed.recommender import Recommender
from mme.distributed.state import weight_pieces
from mme.distributed.world import World
from mme.errors import UserError, one_line
from tests.distributed.processes import run_on
from tests.fuzz.mutations import change_bytes, change_file, change_value

SEED = int(os.environ.get("MME_FUZZ_SEED", "0"))
CASES = int(os.environ.get("MME_FUZZ_CASES", "100"))
LONGEST_S = 60
PREPARE = ["prepare", "--min-user-events", "3", "--format"]
SMALL = [
    "data.max_seq_len=16",
    "model.embedding_dim=8",
    "model.num_blocks=1",
    "model.moe.num_experts=2",
    "train.steps=4",
    "model.moe.placement=[0]",
]
OFTEN = ["train.checkpoint_every=2", "train.eval_every=2", "data.batch_size=16", "train.log_every=1"]

pytestmark = pytest.mark.slow


class Bench:
    """Runs cases, each in a folder of its own, beside files of the user's that must stay as they are."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
        self.folder, self.capfd, self.kind = folder, capfd, kind
        self.mine = folder / "mine" / "canary"
        self.mine.parent.mkdir()
        self.mine.write_text("mine")
        self.succeeded = self.refused = 0

    def cases(self) -> Iterator[tuple[random.Random, Path]]:
        """The random numbers and the folder of each case."""
        for number in range(CASES):
            case = self.folder / f"{self.kind}-seed{SEED}-case{number}"
            case.mkdir()
            yield random.Random(f"{self.kind}/{SEED}/{number}"), case
            assert sorted(path.name for path in self.mine.parent.iterdir()) == ["canary"], case
            assert self.mine.read_text() == "mine", case
            shutil.rmtree(case)
        assert CASES < 50 or (self.succeeded and self.refused)  # or the cases would show nothing

    def run(self, main: Callable[[list[str]], int], *arguments: str | Path) -> bool:
        """Whether a command succeeded; where it did not, it said why in one line and left no traceback."""
        self.capfd.readouterr()
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST_S)
        try:
            status = main([str(argument) for argument in arguments])
        finally:
            signal.alarm(0)
        self.out, error = self.capfd.readouterr()
        assert status in (0, 1, 2), (status, arguments)
        assert "Traceback" not in error and "traceback in" not in error, error
        lines = [line for line in error.splitlines() if not line.startswith("checkpoint skipped: ")]
        assert status == 0 or (len(lines) == 1 and lines[0].startswith("error: ")), error
        self.succeeded, self.refused = self.succeeded + (status == 0), self.refused + (status != 0)
        return status == 0


def _too_long(*_: object) -> None:
    raise AssertionError(f"not ended after {LONGEST_S} s")


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, capfd, request.node.name)


def interactions() -> pa.Table:
    rng = np.random.default_rng(7)
    users, items = rng.integers(0, 12, 240), rng.integers(0, 25, 240)
    return pa.table({"user_id": users, "item_id": items, "timestamp": 1_600_000_000 + rng.integers(0, 10**6, 240)})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a run with two checkpoints, `data` and `run`."""
    folder = tmp_path_factory.mktemp("trained")
    pq.write_table(interactions(), folder / "events.parquet")
    prepare = ["prepare", "--input", folder / "events.parquet", "--output", folder / "data"]
    prepare += ["--format", "parquet", "--min-user-events", "3"]
    assert mme.cli.main([*map(str, prepare)]) == 0
    values = [f"data.path={folder / 'data'}", f"output_dir={folder / 'run'}", *SMALL, *OFTEN]
    train = [sys.executable, "-m", "mme", "train", "--config", "configs/quickstart.yaml", *values]
    subprocess.run(train, check=True, capture_output=True)
    return folder


def check_prepared(folder: Path) -> None:
    """What a command that succeeded has written can be read, as a whole."""
    dataset = PreparedDataset.open(folder)
    assert dataset.num_events > 0
    assert int(dataset.user_offsets[-1]) == dataset.num_events
    assert len(list(dataset.events.scan())) > 0


def test_csv(bench: Bench) -> None:
    table = interactions().to_pydict()
    rows = [",".join(map(str, row)) for row in zip(*table.values(), strict=True)]
    original = "\n".join([",".join(table), *rows, ""]).encode()
    for rng, case in bench.cases():
        (case / "events.csv").write_bytes(change_bytes(rng, original))
        if bench.run(mme.cli.main, *PREPARE, "csv", "--input", case / "events.csv", "--output", case / "out"):
            check_prepared(case / "out")
        else:
            assert [path.name for path in case.iterdir()] == ["events.csv"], case


def test_parquet(bench: Bench) -> None:
    pq.write_table(interactions(), bench.folder / "original.parquet")
    original = (bench.folder / "original.parquet").read_bytes()
    for rng, case in bench.cases():
        (case / "events.parquet").write_bytes(change_bytes(rng, original))
        if bench.run(mme.cli.main, *PREPARE, "parquet", "--input", case / "events.parquet", "--output", case / "out"):
            check_prepared(case / "out")
        else:
            assert [path.name for path in case.iterdir()] == ["events.parquet"], case


def test_configuration(bench: Bench) -> None:
    original = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    for rng, case in bench.cases():
        if rng.randrange(2):
            text = yaml.safe_dump(change_value(rng, original)).encode()
        else:
            text = change_bytes(rng, Path("configs/quickstart.yaml").read_bytes())
        (case / "config.yaml").write_bytes(text)
        if bench.run(launcher.__main__.main, "run", "--config", case / "config.yaml", "--dry-run"):
            config = load_config(case / "config.yaml")
            assert flat(config) == flat(load_config(case / "config.yaml"))
            assert "torch.distributed.run" in bench.out
        for kind in ("slurm", "kubernetes"):
            if bench.run(launcher.__main__.main, kind, "--config", case / "config.yaml", "--dry-run"):
                directives = [line for line in bench.out.splitlines() if line.startswith("#SBATCH")]
                assert kind == "kubernetes" or len(directives) == 9, bench.out


def load_changed(world: World, trained: Path, cases: Path, mine: Path) -> tuple[int, int]:
    """How many changed checkpoints were loaded and refused. What is loaded must be one of the two, bit for bit."""
    config = load_run_config(trained / "run")
    dataset = PreparedDataset.open(config.data.path)
    recommender = Recommender(config, dataset.num_items, world)
    numbering = dataset.numbering_sha256([])

    def load(run: Path, step: int | None) -> tuple[int, dict[str, torch.Tensor]]:
        step = load_weights(run, step, recommender, numbering, notes.append)
        return step, {piece.name: piece.read().clone() for piece in weight_pieces(recommender)}

    notes: list[str] = []
    sound = dict(load(trained / "run", step) for step in (2, 4))
    signal.signal(signal.SIGALRM, _too_long)
    loaded = 0
    for number in range(CASES):
        rng, run = random.Random(f"checkpoint/{SEED}/{number}"), cases / f"seed{SEED}-case{number}"
        shutil.copytree(trained / "run" / "checkpoints", run / "checkpoints")
        for changed in rng.choice([["step_2"], ["step_4"], ["step_2", "step_4"]]):
            name = rng.choice(["index.json", "index.json", "rank_00000.safetensors"])
            change_file(rng, run / "checkpoints" / changed / name, mine)
        signal.alarm(LONGEST_S)
        try:
            step, weights = load(run, None)
            assert all(torch.equal(weights[name], sound[step][name]) for name in weights), run
            loaded += 1
        except UserError as error:
            assert str(error), run
        finally:
            signal.alarm(0)
        shutil.rmtree(run)
    assert all(note.startswith("checkpoint skipped: ") and "\n" not in one_line(note) for note in notes)
    return loaded, CASES - loaded


def test_checkpoint(tmp_path: Path, trained: Path) -> None:
    mine = tmp_path / "mine" / "canary"
    mine.parent.mkdir()
    mine.write_text("mine")
    ((loaded, refused),) = run_on(1, load_changed, trained, tmp_path / "cases", mine)
    assert CASES < 50 or (loaded and refused)
    assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 1


def test_run(bench: Bench, trained: Path) -> None:
    """The other files of a run, by the commands that read them."""
    for rng, case in bench.cases():
        shutil.copytree(trained / "run", case / "run")
        name = rng.choice(["metrics.jsonl", "metrics.jsonl", "config.yaml", "log.txt", "report.html"])
        change_file(rng, case / "run" / name, bench.mine)
        if bench.run(mme.cli.main, "report", "--run", case / "run"):
            assert (case / "run" / "report.html").read_text().lower().startswith("<!doctype html>")


def test_data_set(bench: Bench, trained: Path) -> None:
    split = Split("leave_two_out", 0.1)
    sound = PreparedDataset.open(trained / "data")
    counts, targets = sound.training_counts(split), sound.targets_sha256(split, "test")
    for rng, case in bench.cases():
        data = case / "data"
        shutil.copytree(trained / "data", data, ignore=shutil.ignore_patterns(".cache"))
        change_file(rng, rng.choice(sorted(path for path in data.iterdir())), bench.mine)
        try:
            found = PreparedDataset.open(data)
            assert (found.training_counts(split) == counts).all(), case
            assert found.targets_sha256(split, "test") == targets, case
            assert isinstance(content_sha256(found.info), str)
            bench.succeeded += 1
        except UserError as error:
            bench.refused += 1
            assert "\n" not in one_line(str(error)), case
        assert not [path for path in data.rglob("*") if path.name.startswith(".partial")]


def test_the_cases_differ_and_are_the_same_for_a_seed() -> None:
    def changed(number: int) -> Any:
        return change_bytes(random.Random(number), bytes(range(256)))

    assert changed(1) == changed(1) != changed(2)
