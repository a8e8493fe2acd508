"""Counts the attempts that ended in a number that is not finite: after two at the same step the job goes back one checkpoint.

A checkpoint whose weights are finite but so large that the next step or evaluation overflows would otherwise be resumed
from for ever. The count is kept in the run's folder, because each attempt is a new process.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mme.distributed import checkpoint
from mme.files import read_json, write_text

FILE = "attempts.json"  # in the run's folder
FAILURES_BEFORE_GOING_BACK = 2


@dataclass(frozen=True)
class Attempt:
    """An attempt that met a number that is not finite.

    Attributes:
        job: hash of the configuration; another one is another attempt.
        checkpoint: step of the checkpoint that it resumed from; 0: none.
        failed_at: the step that failed.
        failures: how many attempts in a row failed there.
    """

    job: str
    checkpoint: int
    failed_at: int
    failures: int = 1


def record_failure(run: Path, job: str, resumed_from: int, failed_at: int) -> None:
    """Counts one failure; the count starts again where job, checkpoint or step differ from those of the one before."""
    attempt, before = Attempt(job, resumed_from, failed_at), _read(run)
    if before is not None and before == Attempt(job, resumed_from, failed_at, before.failures):
        attempt = Attempt(job, resumed_from, failed_at, before.failures + 1)
    write_text(run / FILE, json.dumps(asdict(attempt)), run)


def forget(run: Path) -> None:
    (run / FILE).unlink(missing_ok=True)


def go_back(run: Path, job: str) -> str | None:
    """Sets the newest checkpoint aside if the job failed twice at one step after it; returns the line that says so.

    An older checkpoint must be there; otherwise the same one is tried again. The folder keeps its contents under a name
    that nothing resumes from or evaluates, ``step_N.set_aside``.
    """
    attempt, steps = _read(run), checkpoint.steps(run)
    if attempt is None or attempt.job != job or attempt.failures < FAILURES_BEFORE_GOING_BACK:
        return None
    if len(steps) < 2 or steps[-1] != attempt.checkpoint:
        return None
    spoiled = checkpoint.folder(run, attempt.checkpoint)
    aside = spoiled.with_name(f"{spoiled.name}.set_aside")
    if aside.exists():
        checkpoint.remove(aside)
    spoiled.rename(aside)
    forget(run)
    return (
        f"warning: step {attempt.failed_at} was not finite in {attempt.failures} attempts from the checkpoint of step "
        f"{attempt.checkpoint}: that one is set aside as {aside.name}, and training goes back to step {steps[-2]}"
    )


def _read(run: Path) -> Attempt | None:
    with suppress(OSError, ValueError, TypeError):
        return Attempt(**read_json(run / FILE, run))
    return None
