"""How long each rank stands still for the others: exposed communication and stragglers, measured in every step.

Whoever starts a collective, this project, TorchRec or DeepSpeed, waits for it by `torch.distributed.Work.wait`. So that
one method is replaced while a `Pace` is entered. On a CPU the wait blocks the process and the clock tells how long. On a
GPU it holds up the stream that computes: two events about it tell how long that stood still, and an exchange that ended
before it was needed counts as nothing.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from mme.distributed.world import World


class Pace:
    """Adds up the steps' time and how much of it this rank waited in collectives.

    Enter it for as long as steps are taken; call `after_step` after each, and `over_ranks`, a collective, now and then.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._lock = threading.Lock()  # backward may wait in a thread of its own
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
        """A step begins with the wait for its batch; an evaluation or a checkpoint before it belongs to no step."""
        self._take()
        self._began = time.perf_counter()

    def end_step(self) -> float:
        """Seconds since `begin_step`."""
        step_s, waited_s = time.perf_counter() - self._began, self._take()
        for index, value in enumerate((waited_s, step_s - waited_s, 1)):
            self._sums[index] += value
        return step_s

    def over_ranks(self) -> dict[str, float]:
        """Of the steps since the last call, a step's mean: ``wait_ms``, the mean of the ranks; ``straggler_ms``, how much
        longer than the mean of the ranks the ``slowest_rank`` took beside its waiting, so that all others waited for it."""
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
