"""How long does each Triton kernel of a call take?"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.roofline import flush_cache


def kernel_times(run: Callable[[], Any], device: torch.device, repetitions: int) -> dict[str, float]:
    """Median milliseconds of each kernel over ``repetitions`` calls of ``run``, after a warm-up call.

    On a GPU each launch is timed by events, starting with an empty second-level cache. The times of several launches of a kernel
    in one call are added. On a CPU the time is that of Triton's interpreter.
    """
    run()
    calls: dict[str, list[float]] = defaultdict(list)
    for _ in range(repetitions):
        launches: list[tuple[str, Callable[[], float]]] = []
        with _timed_launches(launches) if device.type == "cuda" else _timed_interpreter(launches):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        of_call: dict[str, float] = defaultdict(float)
        for name, milliseconds in launches:
            of_call[name] += milliseconds()
        for name, total in of_call.items():
            calls[name].append(total)
    return {name: statistics.median(times) for name, times in calls.items()}


@contextmanager
def _timed_launches(launches: list[tuple[str, Callable[[], float]]]) -> Iterator[None]:
    from triton import knobs

    def enter(metadata: Any) -> None:
        flush_cache()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launches.append((metadata.get()["name"], lambda: start.elapsed_time(end)))
        running.append(end)
        start.record()

    def leave(_: Any) -> None:
        running.pop().record()

    running: list[torch.cuda.Event] = []
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)


@contextmanager
def _timed_interpreter(launches: list[tuple[str, Callable[[], float]]]) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction

    interpret = InterpretedFunction.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = interpret(self, *arguments, **options)
        took = 1e3 * (time.perf_counter() - start)
        launches.append((self.__name__, lambda: took))
        return result

    with mock.patch.object(InterpretedFunction, "run", run):
        yield
