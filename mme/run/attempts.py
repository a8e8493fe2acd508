"""Counts the attempts that ended in NaN or infinity: after two at the same step the job goes back one checkpoint.

A checkpoint whose weights are finite, but so large that a later step or evaluation overflows, would otherwise be resumed
from forever. The count is kept in the run's folder because each attempt is a new process.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mme.distributed import checkpoint
from mme.errors import FinalError
from mme.files import read_text, remove, write_text
from mme.records import parse_record

Count = Annotated[int, Field(ge=0)]
ATTEMPTS_FILE = "attempts.json"  # name in the run's folder
FAILURES_BEFORE_GOING_BACK = 2


@dataclass(frozen=True)
class Attempt:
    """The latest attempt that ended in a value that is not finite.

    Attributes:
        job: hash of the configuration; a changed configuration starts a new count.
        checkpoint: step of the checkpoint that it resumed from; 0: it started from the beginning.
        failed_at: the step that failed.
        failures: how many attempts in a row failed at this step.
    """

    job: str
    checkpoint: Count
    failed_at: Count
    failures: Count = 1


def record_failure(run: Path, job: str, resumed_from: int, failed_at: int) -> None:
    """Counts one failure. The count starts again if the job or the step differs from that of the failure before.

    It does not depend on the checkpoint, because an attempt that fails has usually written newer ones on its way.
    """
    before = _read(run)
    failures = 1
    if before is not None and (before.job, before.failed_at) == (job, failed_at):
        failures = before.failures + 1
    write_text(run / ATTEMPTS_FILE, json.dumps(asdict(Attempt(job, resumed_from, failed_at, failures))), run)


def forget(run: Path) -> None:
    """Drops the count: the job has got past the step, or starts over."""
    remove(run / ATTEMPTS_FILE)


def go_back(run: Path, job: str) -> str | FinalError | None:
    """Sets checkpoints aside if the job failed twice at one step; returns the line that says so, otherwise None.

    The checkpoint that the latest attempt resumed from is set aside, with those that it wrote on its way to the failure.
    The count stays, so that each further failure at the same step goes back one more. A folder set aside keeps its
    contents under a name from which nothing resumes, ``step_N.set_aside``.

    If no older checkpoint is left, returns an error for all ranks to raise. The count then starts again, so that the user
    can try once more.
    """
    attempt, steps = _read(run), checkpoint.steps(run)
    if attempt is None or attempt.job != job or attempt.failures < FAILURES_BEFORE_GOING_BACK or not steps:
        return None
    spoiled = [step for step in steps if step >= attempt.checkpoint]
    older = [step for step in steps if step < attempt.checkpoint]
    found = f"step {attempt.failed_at} was not finite in {attempt.failures} attempts"
    if not older:
        forget(run)
        return FinalError(
            f"{found}, and no older checkpoint is left to go back to: expected smaller learning rates, or "
            "train.resume=false to start from the beginning"
        )
    for step in spoiled:
        checkpoint.set_aside(run, step)
    names = ", ".join(f"step_{step}" for step in spoiled)
    return f"warning: {found}: training goes back to the checkpoint of step {older[-1]}; set aside as step_N.set_aside: {names}"


def _read(run: Path) -> Attempt | None:
    try:
        return parse_record(read_text(run / ATTEMPTS_FILE, run), Attempt)
    except (OSError, ValueError):  # no attempt has failed yet, or the file is damaged, so the count starts again
        return None
