"""One trial: a training job in separate processes, monitored through its metrics and stopped if it lags behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mme.errors import UserError
from mme.files import make_folder, open_to_append, open_to_read, remove, write_text
from mme.run.metrics_file import METRICS_FILE, read_metrics
from mme.run.preemption import signal_when_parent_dies

LOOK_EVERY_S = 1.0
TRIAL_STOPS_WITHIN_S = 90.0  # longer than the launcher takes to kill stuck workers


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial.

    Attributes:
        status: exit status of the process; None: it was stopped because it lagged behind.
        best: the highest value of the metric on the validation split; None without an evaluation.
        error: the last line on standard error of a job that failed.
    """

    status: int | None
    best: float | None
    error: str = ""


def run_trial(
    command: list[str],
    folder: Path,
    metric: str,
    environment: dict[str, str],
    lags_behind: Callable[[int, float], bool],
    stop: threading.Event,
) -> Outcome:
    """Runs ``command``, which writes its run to ``folder``; its output goes into a file beside that folder.

    Args:
        metric: metric of the evaluations on the validation split, such as ``ndcg@10``.
        lags_behind: called with the number of each evaluation (from 1) and its value; True ends the trial.
        stop: event that ends the search; the job then saves a checkpoint and exits.

    Raises:
        InterruptedError: ``stop`` was set.
        UserError: a link or file is where the trial's folder or its output should be.
    """
    printed = folder.parent / f"{folder.name}.output.txt"
    try:
        make_folder(folder, folder.parent)
        write_text(printed, "", folder.parent)
        stream = open_to_append(printed, folder.parent)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: expected a folder of trials") from error
    with stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),
        )
    told = 0
    lagging = False
    while True:
        ended = _wait(process, stop)
        values = validation_values(folder, metric)
        for number, value in enumerate(values[told:], told + 1):
            lagging = lags_behind(number, value) or lagging
        told = len(values)
        if ended is not None:
            break
        if lagging or stop.is_set():
            _end(process)
            if stop.is_set():
                raise InterruptedError
            return Outcome(None, max(values, default=None))
    reason = "" if ended == 0 else _last_line(printed)
    return Outcome(ended, max(validation_values(folder, metric), default=None), reason)


def validation_values(folder: Path, metric: str) -> list[float]:
    """The metric of each evaluation of the trained model on the validation split, in order."""
    try:
        records = read_metrics(folder / METRICS_FILE)
    except UserError:
        return []  # the job has not written metrics yet
    found = [r for r in records if r["kind"] == "eval" and r.get("split") == "valid" and r.get("model") != "popularity"]
    return [float(record[metric]) for record in found if record.get(metric) is not None]


def remove_checkpoints(folder: Path) -> None:
    """Frees the space of a trial that will not be used again; its configuration and metrics remain."""
    remove(folder / "checkpoints")


def training_command(config: Path, overrides: list[str], processes: int) -> list[str]:
    """The command that trains in one process, or through the launcher in several."""
    if processes == 1:
        return [sys.executable, "-m", "mme", "train", "--config", str(config), *overrides]
    arguments = ["--config", str(config), "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", "launcher", "run", *arguments, *overrides]


def _wait(process: subprocess.Popen[Any], stop: threading.Event) -> int | None:
    """Waits a moment, or not at all if ``stop`` is set; returns the exit status, or None if the process is running."""
    try:
        return process.wait(0 if stop.is_set() else LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[Any]) -> None:
    """Asks the job to save and exit, and kills it if it does not."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(TRIAL_STOPS_WITHIN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(path: Path) -> str:
    with open_to_read(path, path.parent) as file:
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or [""])[-1][:500]
