"""Measures in every step how long each rank waits for the others, how far its device is used, and its peak memory.

This project, TorchRec and DeepSpeed all wait for collectives in `torch.distributed.Work.wait`, which is therefore replaced
while a `Pace` is entered. On a CPU the wait blocks the process and is timed by the clock. On a GPU it blocks the compute
stream; two events around it measure for how long. Communication that finished before it was needed counts as zero: the
wait is the exposed communication.

The utilisation is that of the model's FLOPs (`mme.flops`, over true lengths, without recomputation), as a share of the
devices' published peak. A device without a known peak, as a CPU, has none.
"""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.devices import peak_flops
from mme.distributed.world import World
from mme.flops import training_flops

GIB = 2**30


class Pace:
    """Adds up the time of steps and the part that this rank waited in collectives.

    Enter it around the training loop. Call `begin_step` and `end_step` for each step, `count` for its batch, and `over_ranks`,
    a collective, for each line of the log.

    Args:
        config: of the model whose FLOPs are counted.
        num_items: items of the catalogue.
        peak: FLOPs per second of each rank's device; None: unknown, so that no utilisation is given.
    """

    def __init__(self, world: World, config: Config, num_items: int, peak: float | None) -> None:
        self.world, self.config, self.num_items, self.peak = world, config, num_items, peak
        self._lengths: list[Tensor] = []  # of each batch since `over_ranks`, (2,) int64: its tokens, and pairs of them
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

    def count(self, batch: SequenceBatch) -> None:
        """Adds the FLOPs of this rank's part of a step. The host does not wait for a ``batch`` on a GPU."""
        if self.peak is None:
            return
        lengths = batch.seq_offsets.diff() + bool(self.config.model.user_features)  # the users' tokens
        self._lengths.append(torch.stack([lengths.sum(), (lengths * (lengths + 1)).sum() // 2]))

    def over_ranks(self) -> dict[str, float]:
        """Means per step since the last call.

        ``wait_ms`` is the wait averaged over the ranks, and ``exposed_communication`` its share of the step. ``straggler_ms``
        is how much longer than the average rank the ``slowest_rank`` took outside its waits, so that the others waited for
        it. ``mfu`` is the model FLOPs utilisation. ``peak_mem_gib`` is the peak of the fullest rank: on a GPU of allocated
        memory since the last call, on a CPU of resident memory since the start.
        """
        waited_s, busy_s, steps = self._sums
        own = torch.tensor([waited_s, busy_s, self._take_flops(), self._peak_memory()], dtype=torch.float64)
        self._sums = [0.0, 0.0, 0]
        gathered = torch.cat(self.world.gather(own[None].to(self.world.device))).cpu()
        waited, busy, flops, memory = gathered.T
        seconds = (waited + busy).mean().item()
        found: dict[str, float] = {"peak_mem_gib": round(memory.max().item() / GIB, 3)}
        if self.peak is not None and seconds > 0:
            found["mfu"] = round(flops.sum().item() / (seconds * self.world.size * self.peak), 4)
        if self.world.size > 1:
            found |= {
                "wait_ms": round(1000 * waited.mean().item() / steps, 3),
                "exposed_communication": round(waited.mean().item() / seconds, 4),
                "straggler_ms": round(1000 * (busy.max() - busy.mean()).item() / steps, 3),
                "slowest_rank": int(busy.argmax()),
            }
        return found

    def _take_flops(self) -> int:
        """The FLOPs of the batches since the last call."""
        counts, self._lengths = torch.stack(self._lengths).tolist() if self._lengths else [], []
        return sum(sum(training_flops(self.config, tokens, pairs, self.num_items).values()) for tokens, pairs in counts)

    def _peak_memory(self) -> int:
        """Bytes."""
        if self.world.device.type != "cuda":
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        peak = torch.cuda.max_memory_allocated(self.world.device)
        torch.cuda.reset_peak_memory_stats(self.world.device)
        return peak

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


def known_peak(config: Config, device: torch.device) -> float | None:
    """FLOPs per second that ``device`` can reach in `train.precision`; None: unknown, or the model's FLOPs are not counted."""
    if device.type != "cuda" or config.model.block != "fuxi":
        return None
    return peak_flops(torch.cuda.get_device_name(device), config.train.precision_on("cuda"))
