"""Jobs that are stopped, killed or frozen recover and end with the bits of an undisturbed job."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mme.config import load_config
from mme.data.dataset import PreparedDataset
from mme.data.event_file import CACHE_FOLDER
from mme.distributed.world import World
from mme.errors import Preempted
from mme.prepare.synthetic import prepare_synthetic
from mme.run.metrics_file import read_metrics
from mme.run.preemption import Preemption
from mme.training import Training
from tests.distributed.processes import run_on
from tests.test_train import SMALL, losses, metrics

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# Checkpoints at almost every step, so that kills also hit them.
OFTEN = [
    "train.checkpoint_every=2",
    "train.eval_every=7",
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "train.epochs=4",
]
PATIENCE_S = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "small"
    prepare_synthetic("quickstart", folder, users=100, items=120, seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an undisturbed job."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with started(data, run) as job:
        assert job.wait(PATIENCE_S) == 0
    return run


@contextmanager
def started(data: Path, run: Path, *overrides: str, max_restarts: int = 3) -> Iterator[subprocess.Popen[str]]:
    """`launcher run` with two processes, which are killed at the end."""
    command = [sys.executable, "-m", "launcher", "run", "--config", str(QUICKSTART), "--nproc-per-node", "2"]
    command += [
        "--max-restarts",
        str(max_restarts),
        f"data.path={data}",
        f"output_dir={run}",
        *SMALL,
        *OFTEN,
        *overrides,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (run.parent / "errors.txt").open("a") as errors:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, text=True, env=environment)
        try:
            yield job
        finally:
            for process in [*workers(run), psutil.Process(job.pid)] if job.poll() is None else workers(run):
                process.kill()
            job.wait()


def workers(run: Path) -> list[psutil.Process]:
    """The training processes of a run, in rank order."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"output_dir={run}" in words and "mme" in words and "torch.distributed.run" not in words:
            try:
                found[process.environ()["RANK"]] = process
            except (psutil.Error, KeyError):
                continue
    return [found[rank] for rank in sorted(found)]


def errors_of(run: Path) -> str:
    return (run.parent / "errors.txt").read_text()


def wait_until(condition: Any, job: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert job.poll() is None, "the job ended before"
        assert time.monotonic() < until
        time.sleep(0.02)


def reached(run: Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and any(line["step"] >= step for line in read_metrics(path) if line["kind"] == "train")


def check_same(run: Path, whole: Path) -> None:
    """All losses and metrics are bitwise equal, none is missing or repeated."""
    assert losses(run) == losses(whole)
    assert metrics(run, "valid") == metrics(whole, "valid")
    assert metrics(run, "test")[-2:] == metrics(whole, "test")[-2:]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(data, run) as job:
        wait_until(lambda: reached(run, 3), job)
        sent = time.monotonic()
        job.terminate()
        assert job.wait(PATIENCE_S) == 143
        assert time.monotonic() - sent < PATIENCE_S
        assert not workers(run)
    (line,) = errors_of(run).splitlines()
    step = losses(run)[-1][0]
    assert line == f"asked to stop: saved at step {step}; the same command resumes from there"
    assert (run / "checkpoints" / f"step_{step}" / "index.json").exists()
    with started(data, run) as job:
        assert job.wait(PATIENCE_S) == 0
    check_same(run, whole)


def stop_while_it_evaluates(world: World, data: str, run: str) -> str:
    """Trains until the second evaluation, in which this process sends itself SIGTERM."""
    config = load_config(QUICKSTART, [f"data.path={data}", f"output_dir={run}", *SMALL, *OFTEN])
    with Preemption() as preemption:
        training = Training(config, PreparedDataset.open(Path(data)), world, preemption)
        beat, evaluated = training.watchdog.beat, []

        def beat_and_stop(doing: str) -> None:
            beat(doing)
            evaluated.append(doing)
            if evaluated.count("evaluating step 14") == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        training.watchdog.beat = beat_and_stop  # type: ignore[method-assign]
        with pytest.raises(Preempted) as stopped:
            training.run()
    assert evaluated.count("evaluating step 14") < 10  # of 13 batches of each of 2 ranks
    return str(stopped.value)


@pytest.mark.slow
def test_after_sigterm_in_an_evaluation_the_next_start_evaluates(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (message, _) = run_on(2, stop_while_it_evaluates, str(data), str(run))
    assert message == "asked to stop: saved at step 14; the same command resumes from there"
    assert json.loads((run / "checkpoints" / "step_14" / "index.json").read_text())["progress"]["evaluate"]
    assert [line["step"] for line in metrics(run, "valid")] == [7, 7]
    with started(data, run) as job:
        assert job.wait(PATIENCE_S) == 0
    check_same(run, whole)


@pytest.mark.slow
def test_repeated_kills_do_not_change_the_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    """Kills any worker at any moment, more often than restarts without progress are allowed."""
    run, moments = tmp_path / "run", random.Random(5)
    with started(data, run, max_restarts=2) as job:
        for kill in range(4):
            wait_until(lambda: len(workers(run)) == 2 and reached(run, 2 + 8 * kill), job)  # noqa: B023
            time.sleep(moments.uniform(0, 0.5))
            victim = moments.choice(workers(run))
            victim.kill()
            wait_until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, job)  # noqa: B023
        assert job.wait(PATIENCE_S) == 0, errors_of(run)
    check_same(run, whole)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_worker_and_loses_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(data, run) as job:
        wait_until(lambda: reached(run, 3), job)
        job.kill()
        job.wait()
        until = time.monotonic() + PATIENCE_S
        while workers(run):
            assert time.monotonic() < until
            time.sleep(0.1)
    assert "asked to stop: saved at step" in (run / "log.txt").read_text()
    with started(data, run) as job:
        assert job.wait(PATIENCE_S) == 0
    check_same(run, whole)


@pytest.mark.slow
def test_a_frozen_worker_is_named_and_the_job_recovers(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(data, run, "train.hang_timeout_s=20") as job:
        wait_until(lambda: len(workers(run)) == 2 and reached(run, 3), job)
        frozen = workers(run)[1]
        os.kill(frozen.pid, signal.SIGSTOP)
        wait_until(lambda: "rank 1 hangs (its process does not answer)" in errors_of(run), job)
        frozen.kill()  # torchrun would do so a minute later
        assert job.wait(PATIENCE_S) == 0, errors_of(run)
    check_same(run, whole)


@pytest.mark.slow
def test_data_damaged_during_training_are_named_and_rewritten(data: Path, whole: Path, tmp_path: Path) -> None:
    """The flat file of the events is truncated during training: the job fails with one line, and the next attempt rewrites the file and resumes."""
    run, own = tmp_path / "run", tmp_path / "own"
    shutil.copytree(data, own, ignore=shutil.ignore_patterns(CACHE_FOLDER))
    with started(own, run) as job:
        wait_until(lambda: reached(run, 3), job)
        (file,) = (own / CACHE_FOLDER).glob("*.events")
        os.truncate(file, 100)
        assert job.wait(PATIENCE_S) == 0
    assert re.search(r"error: .*\.events: damaged: ends before byte \d+; it has been removed", errors_of(run))
    check_same(run, whole)


@pytest.mark.slow
def test_a_missing_part_ends_the_job_immediately(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(data, own)
    (own / "part-00000.parquet").unlink()
    with started(own, tmp_path / "run") as job:
        assert job.wait(PATIENCE_S) == 2
    (line,) = [line for line in errors_of(tmp_path / "run").splitlines() if line.startswith("error: ")]
    assert line == f"error: {own}/part-00000.parquet: no such file, though dataset.json names it"
