"""Admits one job at a time to a run's folder, because two would overwrite each other's checkpoints and metrics."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mme.distributed.world import World
from mme.errors import UserError, print_line
from mme.files import release_lock, take_lock

LOCK_FILE = ".lock"
RELEASED_WITHIN_S = 120  # a file server may take this long to notice that the node of a dead job is gone
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def only_job(run: Path, world: World, patience_s: float = RELEASED_WITHIN_S) -> Iterator[None]:
    """Keeps other jobs out of ``run``, which is created if it is missing; a collective.

    If the file system has no locks, a line says so, and nothing keeps other jobs out.

    Raises:
        UserError: another job is still there after ``patience_s``, or the folder can't be made or written to.
    """
    path, lock, problem = run / LOCK_FILE, None, ""
    if world.rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = _wait_for_lock(path, patience_s)
        except BlockingIOError:
            problem = f"output_dir {run}: another job is training there: end it, or choose another output_dir"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                problem = (
                    f"output_dir {error.filename or run}: {error.strerror}: expected a folder that can be written to"
                )
            else:
                print_line(f"{run}: can't be locked ({error.strerror}): start no second job there", sys.stdout)
    if problem := world.of_first(problem):
        raise UserError(problem)
    try:
        yield
    finally:
        if lock is not None:
            release_lock(path, lock)


def _wait_for_lock(path: Path, patience_s: float) -> int:
    deadline, waiting = time.monotonic() + patience_s, False
    while True:
        try:
            return take_lock(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        if not waiting:
            waits = f"{path.parent}: another job is training there; waiting {patience_s:.0f} s for its end"
            print_line(waits, sys.stdout)
        waiting = True
        time.sleep(0.5)
