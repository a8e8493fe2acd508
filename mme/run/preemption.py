"""Preemption: SIGTERM asks the job to stop, which it does after a step, with all saved.

A scheduler sends SIGTERM before it takes a node away or a time limit is reached. One rank that has received it is enough:
the ranks tell each other in the sum of the next step, write a checkpoint and leave with status 143, on which the job
is queued again (see docs/multi-node.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # sys/prctl.h


class Preemption:
    """While it is entered, SIGTERM no longer ends the process but is noted in ``requested``.

    Under torchrun its death does the same: a worker that nobody restarts saves what it has and goes.
    """

    requested = False

    def __enter__(self) -> Preemption:
        self._before: Any = signal.signal(signal.SIGTERM, self._note)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal_when_parent_dies(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.requested:  # else what asked may ask again while the process is leaving
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.requested = True


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Linux tells a process by a signal; elsewhere the watchdog notices."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, int(number))
