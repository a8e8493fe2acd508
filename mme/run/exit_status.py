"""Ends commands with one line on standard error and an exit status.

0: done. 1: the job failed, and the traceback is in log.txt. 2: the input or the configuration is wrong. 130: interrupted.
143: asked to stop by SIGTERM, usually with everything saved. `mme.errors.one_line` escapes control characters in every line.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from mme.errors import DISK_ERRORS, FinalError, JobError, Preempted, UserError, indented_lines, one_line
from mme.files import open_to_append

USER_ERROR = 2
NO_RESTART = 3  # tells the launcher that a worker under torchrun failed and would fail again
INTERRUPTED, PREEMPTED = 130, 143  # 128 + SIGINT, 128 + SIGTERM, as in a shell


class ErrorContext:
    """Tells where the traceback goes: ``folder`` is the folder of log.txt, if there is one."""

    folder: Path | None = None


@contextmanager
def job_status() -> Iterator[ErrorContext]:
    """Ends the command with one line and the exit status if its body raises."""
    job = ErrorContext()
    try:
        yield job
    except UserError as error:
        # Every rank, or every rank of a node, finds the same mistake. One line per node is enough on the terminal; each
        # rank's log has its own.
        if rank() == 0 or os.environ.get("LOCAL_RANK") == "0":
            print_error(str(error))
        append_to_log(job.folder, one_line(f"error: {error}"))
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt as error:
        if rank() == 0:
            print_error(_interrupted(job.folder))
        raise typer.Exit(INTERRUPTED) from error
    except JobError as error:
        if rank() == 0:
            print_error(str(error))
        append_to_log(job.folder, one_line(f"error: {error}"))
        raise typer.Exit(_final_status() if isinstance(error, FinalError) else 1) from error
    except Preempted as error:
        append_to_log(job.folder, one_line(str(error)))
        if rank() == 0:
            print(one_line(str(error)), file=sys.stderr, flush=True)
        raise typer.Exit(PREEMPTED) from error
    except Exception as error:
        log = append_to_log(job.folder, indented_lines(traceback.format_exc()))
        is_full = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if log is None and not is_full:
            traceback.print_exc()
        where = "" if log is None else f" (traceback in {log})"
        if not is_full or rank() == 0 or os.environ.get("LOCAL_RANK") == "0":  # see UserError
            print_error(f"{_summary(error)}{where}")
        raise typer.Exit(_final_status() if is_full else 1) from error


def warn_of(error: Exception, folder: Path, what: str) -> None:
    """Says in one line that ``what`` failed although the job is done; the traceback goes to the log."""
    log = append_to_log(folder, indented_lines(traceback.format_exc()))
    where = "" if log is None else f" (traceback in {log})"
    sys.stderr.write(f"warning: {one_line(f'{what}: {_summary(error)}{where}')}\n")
    sys.stderr.flush()


def _final_status() -> int:
    return NO_RESTART if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _summary(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if text and type(error).__module__.startswith("mme."):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _interrupted(folder: Path | None) -> str:
    if folder is not None and any(folder.glob("checkpoints/step_*")):
        return "interrupted; the same command resumes from the newest checkpoint"
    return "interrupted"


def print_error(text: str) -> None:
    """Prints one line on standard error in a single write, because the ranks share it and lines must not mix."""
    who = "" if rank() == 0 else f"rank {rank()}: "
    sys.stderr.write(f"{who}error: {one_line(text)}\n")
    sys.stderr.flush()


def append_to_log(folder: Path | None, text: str) -> Path | None:
    """Appends to this rank's log and returns its path; None if there is no folder yet or it can't be written to."""
    if folder is None or not folder.is_dir():
        return None
    path = folder / ("log.txt" if rank() == 0 else f"log.rank{rank()}.txt")
    try:
        with open_to_append(path, folder) as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    except OSError:
        return None
    return path


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
