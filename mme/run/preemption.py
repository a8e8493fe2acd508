"""Handles preemption: SIGTERM asks the job to stop, and the job saves everything and stops after a step.

A scheduler sends SIGTERM before it takes a node away or a time limit is reached. It is enough that one rank receives it: the
ranks share it in the sum of the next step, write a checkpoint and exit with status 143. Then the job can be queued again (see
docs/multi-node.md). A rank whose step does not end, because it or another rank is stuck, exits with the same status after
`EXITS_WITHIN_S`, without a checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from mme.run.exit_status import PREEMPTED, append_to_log, rank

PR_SET_PDEATHSIG = 1  # sys/prctl.h
EXITS_WITHIN_S = 45.0  # the launcher kills what is left a little later, see launcher.torchrun


class Preemption:
    """A context in which SIGTERM sets ``requested`` instead of ending the process.

    Under torchrun, so does torchrun's death: a worker that nobody would restart saves its state and exits.

    Args:
        run: the folder whose log records a process that had to leave without saving.
        stops_within_s: how long the process has to leave the context after SIGTERM.
    """

    requested = False

    def __init__(self, run: Path | None = None, stops_within_s: float = EXITS_WITHIN_S) -> None:
        self.run, self.stops_within_s = run, stops_within_s
        self._left = threading.Event()

    def __enter__(self) -> Preemption:
        # Python runs a handler only between two of its instructions, so never in a collective that does not return. The
        # signal's number is written to this pipe at once, where a thread reads it.
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        self._before: Any = signal.signal(signal.SIGTERM, self._note)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal_when_parent_dies(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)
        if not self.requested:  # otherwise a second SIGTERM may come while the process exits
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.requested = True

    def _watch(self) -> None:
        """Ends the process if it still runs some time after SIGTERM."""
        while numbers := os.read(self._reading, 64):
            if signal.SIGTERM in numbers and not self._left.wait(self.stops_within_s):
                text = (
                    f"asked to stop, but a step did not end within {self.stops_within_s:g} s: nothing is saved; the same "
                    "command resumes from the last complete checkpoint"
                )
                append_to_log(self.run, text)
                if rank() == 0:
                    sys.stderr.write(f"{text}\n")
                    sys.stderr.flush()
                os._exit(PREEMPTED)  # the main thread is stuck, so nothing else would end the process
        os.close(self._reading)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """On Linux the kernel sends the signal; elsewhere the watchdog notices."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, int(number))
