"""Profiles some steps of a training job: a trace, time by part and memory by part.

It writes to the run's `profile/`, for each rank in `train.profile_ranks`:

- `trace_rank_R.json.gz`: the trace of PyTorch's profiler with the marks of `mme.profiling.regions`, for ui.perfetto.dev or
  chrome://tracing;
- `parts_rank_R.txt` and `.json`: time by part, and the largest allocations at the peak of memory;
- `memory_rank_R.pickle`, only on a GPU: PyTorch's memory snapshot with the history of the profiled steps, for
  pytorch.org/memory_viz.

Profiling does not change the bits that steps compute.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as torch_profile

from mme.config import TrainConfig
from mme.data.loaders import Worker
from mme.files import make_folder, replacing, write_text
from mme.profiling.regions import OTHER, REGIONS
from mme.profiling.trace import Allocations, TimeByPart, Trace

Element = TypeVar("Element")

PROFILE_FOLDER = "profile"  # in the run's folder
MEMORY_EVENTS = 1_000_000  # allocations and frees kept in the GPU's history
ALLOCATIONS_SHOWN = 20


def profiled(
    elements: Iterator[Element],
    train: TrainConfig,
    left: int,
    run_folder: Path,
    worker: Worker,
    note: Callable[[str], None],
) -> Iterator[Element]:
    """Yields ``elements``, one per step, and profiles the steps that `train.profile` selects for this rank.

    Args:
        left: number of steps until the end of training.
    """
    if not train.profile or (train.profile_ranks and worker.rank not in train.profile_ranks):
        return elements
    if train.profile_start + train.profile > left:
        note(f"no profile: it needs {train.profile_start + train.profile:,} steps, and {left:,} are left")
        return elements
    folder = run_folder / PROFILE_FOLDER
    return StepProfile(train.profile, train.profile_start, folder, worker.rank, worker.device, note).each(elements)


class StepProfile:
    """Records ``steps`` steps of this process after the first ``start`` steps.

    Call `step` after each step, or loop over `each`.

    Args:
        folder: folder for the files; created when there is something to write.
        rank: rank for the file names.
        note: prints one line for the user.
    """

    def __init__(
        self, steps: int, start: int, folder: Path, rank: int, device: torch.device, note: Callable[[str], None]
    ) -> None:
        self.start, self.end = start, start + steps
        self.folder, self.rank, self.note = folder, rank, note
        self.on_gpu = device.type == "cuda"
        self.result: TimeByPart | None = None  # set when all steps are recorded
        self._done = 0
        self._seconds: list[float] = []  # times of the steps before the profile
        self._began = time.perf_counter()
        self._torch = torch_profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])],
            schedule=schedule(wait=start - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def __enter__(self) -> StepProfile:
        self._torch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._torch.stop()

    def each(self, elements: Iterable[Element]) -> Iterator[Element]:
        """Yields ``elements``; the wait for an element and the caller's work with it are one step."""
        with self:
            for element in elements:
                yield element
                self.step()

    def step(self) -> None:
        if self.result:
            return
        if 0 < self._done < self.start - 1:  # neither the first step nor the profiler's warm-up
            self._seconds.append(time.perf_counter() - self._began)
        self._done += 1
        if self.on_gpu and self._done == self.start:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._torch.step()
        self._began = time.perf_counter()

    def _write(self, recorded: Any) -> None:
        if self._done < self.end:  # the job ended early, and an incomplete profile would mislead
            return
        run = self.folder.parent
        make_folder(self.folder, run)
        if self.on_gpu:
            with replacing(self._path("memory", "pickle"), run) as partial:
                torch.cuda.memory._dump_snapshot(str(partial))
            torch.cuda.memory._record_memory_history(enabled=None)
        trace_file = self._path("trace", "json.gz")
        with replacing(trace_file, run) as partial:
            recorded.export_chrome_trace(str(partial))
        trace = Trace.read(trace_file)
        self.result, memory = trace.time_by_part(), trace.peak_memory()
        before_ms = 1000 * statistics.median(self._seconds) if self._seconds else None
        record = {
            **asdict(self.result),
            "percent": self.result.percent(),
            "step_ms_without_profile": before_ms,
            "allocated_bytes": sum(row.num_bytes for row in memory),
            "allocations": [row._asdict() for row in memory],
        }
        write_text(self._path("parts", "json"), json.dumps(record, indent=1) + "\n", run)
        with replacing(self._path("parts", "txt"), run) as partial, partial.open("w") as file:
            console = Console(file=file, width=120)
            for table in (time_table(self.result, before_ms), _memory_table(memory, self.on_gpu)):
                console.print(table)
        largest = ", ".join(f"{part} {percent:.0f}%" for part, percent in list(self.result.percent().items())[:4])
        self.note(
            f"profile of {self.result.steps} steps, {self.result.step_ms:.0f} ms each: {largest}; {self._path('parts', 'txt')}"
        )

    def _path(self, stem: str, suffix: str) -> Path:
        return self.folder / f"{stem}_rank_{self.rank}.{suffix}"


def time_table(time_by_part: TimeByPart, before_ms: float | None = None) -> Table:
    """The table of time by part. ``before_ms`` is the time of a step without the profile."""
    title = f"{time_by_part.steps} steps of {time_by_part.step_ms:.1f} ms"
    title += f" ({before_ms:.1f} ms without the profile)" if before_ms else ""
    busy = "" if time_by_part.gpu_busy is None else f"; a kernel runs {time_by_part.gpu_busy:.1%} of the time"
    caption = f"collectives in flight: {time_by_part.communication_ms:.2f} ms per step{busy}"
    table = Table(title=title, caption=caption)
    for column in ("part", "ms per step", "%", "description"):
        table.add_column(column, justify="right" if column in ("ms per step", "%") else "left")
    for part, percent in time_by_part.percent().items():
        meaning = REGIONS.get(part, "everything else" if part == OTHER else "")
        table.add_row(part, f"{time_by_part.parts_ms[part]:.2f}", f"{percent:.1f}", meaning)
    table.add_section()
    table.add_row("step", f"{time_by_part.step_ms:.2f}", "100.0", "")
    return table


def _memory_table(rows: list[Allocations], on_gpu: bool) -> Table:
    total = sum(row.num_bytes for row in rows)
    table = Table(
        title=f"{total / 2**20:.1f} MiB allocated by the steps on the {'GPU' if on_gpu else 'CPU'} at the peak of memory",
        caption="without weights, optimizer states and other tensors that are older than the profile",
    )
    for column in ("part", "operation", "MiB", "tensors"):
        table.add_column(column, justify="right" if column in ("MiB", "tensors") else "left")
    for row in rows[:ALLOCATIONS_SHOWN]:
        table.add_row(row.part, row.operation, f"{row.num_bytes / 2**20:.2f}", f"{row.tensors:,}")
    if rest := rows[ALLOCATIONS_SHOWN:]:
        mib, count = sum(row.num_bytes for row in rest) / 2**20, sum(row.tensors for row in rest)
        table.add_row("", f"{len(rest)} others", f"{mib:.2f}", f"{count:,}")
    return table
