"""Measures in every step how long each rank waits for the others: exposed communication and stragglers.

This project, TorchRec and DeepSpeed all wait for collectives in `torch.distributed.Work.wait`, which is therefore replaced
while a `Pace` is entered. On a CPU the wait blocks the process and is timed by the clock. On a GPU it blocks the compute
stream; two events around it measure for how long. Communication that finished before it was needed counts as zero.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from mme.distributed.world import World


class Pace:
    """Adds up the time of steps and the part that this rank waited in collectives.

    Enter it around the training loop. Call `begin_step` and `end_step` for each step, and `over_ranks`, a collective, for
    each line of the log.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._lock = threading.Lock()  # backward may wait in another thread
        self._waited_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sums = [0.0, 0.0, 0]  # seconds waited, seconds not waited, steps since `over_ranks`

    def __enter__(self) -> Pace:
        self._wait = wait = dist.Work.wait
        measured = self._on_gpu if self.world.device.type == "cuda" else self._on_cpu

        def wait_and_measure(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            return measured(lambda: wait(work, *args, **kwargs))

        dist.Work.wait = wait_and_measure  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        dist.Work.wait = self._wait  # type: ignore[method-assign]

    def begin_step(self) -> None:
        """Starts a step, before the wait for its batch. An evaluation or checkpoint before it belongs to no step."""
        self._take()
        self._began = time.perf_counter()

    def end_step(self) -> float:
        """Seconds since `begin_step`."""
        step_s, waited_s = time.perf_counter() - self._began, self._take()
        for index, value in enumerate((waited_s, step_s - waited_s, 1)):
            self._sums[index] += value
        return step_s

    def over_ranks(self) -> dict[str, float]:
        """Means per step since the last call.

        ``wait_ms`` is the wait averaged over the ranks. ``straggler_ms`` is how much longer than the average rank the
        ``slowest_rank`` took outside its waits, so that the others waited for it.
        """
        own = torch.tensor(self._sums[:2], dtype=torch.float64, device=self.world.device) / self._sums[2]
        self._sums = [0.0, 0.0, 0]
        waited, busy = 1000 * torch.stack(self.world.gather(own[None])).view(-1, 2).T
        return {
            "wait_ms": round(waited.mean().item(), 3),
            "straggler_ms": round((busy.max() - busy.mean()).item(), 3),
            "slowest_rank": int(busy.argmax()),
        }

    def _on_cpu(self, wait: Any) -> Any:
        began = time.perf_counter()
        try:
            return wait()
        finally:
            with self._lock:
                self._waited_s += time.perf_counter() - began

    def _on_gpu(self, wait: Any) -> Any:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        try:
            return wait()
        finally:
            after.record()
            with self._lock:
                self._events.append((before, after))

    def _take(self) -> float:
        """Seconds waited since the last call."""
        with self._lock:
            waited_s, self._waited_s = self._waited_s, 0.0
            events, self._events = self._events, []
        for before, after in events:
            after.synchronize()
            waited_s += before.elapsed_time(after) / 1000
        return waited_s
