"""Time and memory of profiled steps by part, read from the trace of PyTorch's profiler.

The part of an operation is the innermost mark of `mme.profiling.regions` around it. Backward has no marks. Autograd numbers
the operations of forward, and each step of backward carries the number of its forward operation, whose part it gets.

Each moment of the steps counts for exactly one part, so that the parts add up to the whole:

- On a CPU it is the part of the running operation. If none runs but a collective is in flight, it is the exchange.
  Otherwise it is the part of the Python code.
- On a GPU it is the part whose code launched the running kernel. Compute kernels take precedence over communication, so
  communication that is hidden behind arithmetic costs nothing. If no kernel runs, the GPU waits for the host, and the part
  of the host's code counts.

Format: Chrome's trace events as torch.profiler exports them, with times in microseconds.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mme.profiling.regions import BACKWARD, EXCHANGE, OTHER, REGIONS

Event = dict[str, Any]

STEP = "ProfilerStep#"
OF_BACKWARD = "autograd::engine::evaluate_function: "
HOST = ("cpu_op", "user_annotation")
LAUNCH = ("cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# Operations in which the host does not compute: they start other operations, or run Python code that may wait.
NOT_COMPUTING = ("c10d::", "autograd::", "torch::autograd::", "profiler::")
CUDA_MEMORY = 1  # "Device Type" of a memory event; 0: CPU


class Span(NamedTuple):
    """The time from ``start`` to ``end`` in ``part``, with the innermost event's name.

    ``computes`` is true for operations and false for Python code.
    """

    start: float
    end: float
    part: str
    name: str
    computes: bool = True


@dataclass(frozen=True)
class TimeByPart:
    """The time of one rank's steps by part.

    Attributes:
        steps: number of profiled steps.
        step_ms: mean time of a step.
        parts_ms: milliseconds per step of each part, largest first; they add up to ``step_ms``. "exchange" is the
            communication that no computation hides.
        communication_ms: milliseconds per step with a collective in flight, hidden or not.
        gpu_busy: share of the time with a running kernel; None without a GPU.
    """

    steps: int
    step_ms: float
    parts_ms: dict[str, float]
    communication_ms: float
    gpu_busy: float | None

    def percent(self) -> dict[str, float]:
        """The percentage of each part, rounded to tenths so that they add up to 100."""
        shares = {part: 1000 * ms / self.step_ms for part, ms in self.parts_ms.items()}
        whole = {part: int(share) for part, share in shares.items()}
        missing = 1000 - sum(whole.values())
        for part in sorted(shares, key=lambda part: whole[part] - shares[part])[:missing]:
            whole[part] += 1
        return {part: tenths / 10 for part, tenths in whole.items()}


class Allocations(NamedTuple):
    """Memory that one operation of a part had allocated and that was in use at the peak."""

    part: str
    operation: str
    num_bytes: int
    tensors: int


class Trace:
    """The events of one rank's trace."""

    def __init__(self, events: list[Event]) -> None:
        spans = [event for event in events if event.get("ph") == "X" and event.get("dur", 0) > 0]
        steps = [e for e in spans if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)]
        if not steps:
            raise ValueError(f"the trace has no event {STEP}…: no step was profiled")
        self.steps = sorted((e["ts"], e["ts"] + e["dur"]) for e in steps)
        host = [e for e in spans if e.get("cat") in HOST and not e["name"].startswith((STEP, "gloo:"))]
        # The thread of the training loop and, with a GPU, autograd's thread.
        names = {steps[0]["tid"]} | {e["tid"] for e in host if e["name"].startswith(OF_BACKWARD)}
        threads = {thread: [event for event in host if event["tid"] == thread] for thread in names}
        parts = _part_by_number(threads[steps[0]["tid"]])
        self.host = {thread: _innermost(of_thread, parts) for thread, of_thread in threads.items()}
        launches = {e["args"]["correlation"]: e for e in spans if e.get("cat") in LAUNCH and "correlation" in e["args"]}
        self.kernels: list[Span] = []
        self.collectives = [_span(e, EXCHANGE) for e in spans if e["name"].startswith("gloo:")]
        for event in (e for e in spans if e.get("cat") in DEVICE):
            launch = launches.get(event["args"].get("correlation"))
            if event["name"].startswith("nccl"):
                self.collectives.append(_span(event, EXCHANGE))
            else:
                self.kernels.append(_span(event, self.part_at(launch) if launch else OTHER))
        self.memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Reads a compressed trace as torch.profiler exports it."""
        with gzip.open(path, "rt") as file:
            return cls(json.load(file)["traceEvents"])

    def part_at(self, event: Event) -> str:
        """The part of the event's thread at the start of the event."""
        span = self._at(event)
        return span.part if span else OTHER

    def time_by_part(self) -> TimeByPart:
        host = [span for spans in self.host.values() for span in spans]
        if self.kernels:
            of_autograd = [span for span in host if span.part.startswith(f"{BACKWARD}: ")]
            layers = [self.kernels, self.collectives, of_autograd, host]
        else:
            layers = [[span for span in host if span.computes], self.collectives, host]
        totals = _share_out(layers, self.steps)
        whole, steps = sum(totals.values()), len(self.steps)
        idle = _share_out([self.kernels, self.collectives], self.steps)[OTHER] if self.kernels else 0.0
        return TimeByPart(
            steps=steps,
            step_ms=whole / steps / 1000,
            parts_ms={part: total / steps / 1000 for part, total in totals.most_common() if total},
            communication_ms=_share_out([self.collectives], self.steps)[EXCHANGE] / steps / 1000,
            gpu_busy=1 - idle / whole if self.kernels else None,
        )

    def peak_memory(self) -> list[Allocations]:
        """The steps' allocations that were alive at the peak, largest first; on the GPU if there is one."""
        device = CUDA_MEMORY if self.kernels else 0
        events = [event for event in self.memory if event["args"]["Device Type"] == device]
        sizes = list(itertools.accumulate(_replay(events), initial=0))
        until = sizes.index(max(sizes))
        alive: dict[int, Event] = {}
        for event, change in zip(events[:until], _replay(events[:until]), strict=True):
            if change > 0:
                alive[event["args"]["Addr"]] = event
            else:
                alive.pop(event["args"]["Addr"], None)
        num_bytes: Counter[tuple[str, str]] = Counter()
        count: Counter[tuple[str, str]] = Counter()
        for event in alive.values():
            span = self._at(event)
            place = (span.part, span.name) if span else (OTHER, OTHER)
            num_bytes[place] += event["args"]["Bytes"]
            count[place] += 1
        return [Allocations(*place, size, count[place]) for place, size in num_bytes.most_common()]

    def _at(self, event: Event) -> Span | None:
        """The span of the event's thread at the start of the event."""
        spans = self.host.get(event["tid"], [])
        place = bisect.bisect_right(spans, event["ts"], key=lambda span: span.start) - 1
        return spans[place] if place >= 0 and event["ts"] < spans[place].end else None


def _span(event: Event, part: str) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], part, event["name"])


def _nested(events: Iterable[Event]) -> list[Event]:
    """Sorts events by start, outer events before inner ones that start at the same time."""
    return sorted(events, key=lambda event: (event["ts"], -event["dur"]))


def _part_by_number(events: list[Event]) -> dict[int, str]:
    """The part of each operation of forward, by its number in autograd.

    An event carries the number of the next operation that is recorded for backward. Of several events with the same number,
    the last is that operation.
    """
    parts: dict[int, str] = {}
    marks: list[Event] = []
    for event in _nested(events):
        while marks and marks[-1]["ts"] + marks[-1]["dur"] <= event["ts"]:
            marks.pop()
        if event["name"].startswith(OF_BACKWARD) or (event["cat"] == "user_annotation" and event["name"] in REGIONS):
            marks.append(event)
        elif marks and marks[-1]["name"] in REGIONS and "Sequence number" in event["args"]:
            parts[event["args"]["Sequence number"]] = marks[-1]["name"]
    return parts


def _innermost(events: list[Event], part_by_number: dict[int, str]) -> list[Span]:
    """The innermost event of one thread at each moment, as consecutive spans."""
    spans: list[Span] = []
    stack: list[tuple[float, str, str, bool]] = []  # end, part, name, computes
    at = 0.0

    def run_to(moment: float) -> None:
        nonlocal at
        while stack and at < moment:
            end, part, name, computes = stack[-1]
            if at < min(end, moment):
                spans.append(Span(at, min(end, moment), part, name, computes))
                at = min(end, moment)
            if end <= moment:
                stack.pop()
        at = max(at, moment)

    for event in _nested(events):
        run_to(event["ts"])
        name, args = event["name"], event.get("args", {})
        part = outer = stack[-1][1] if stack else OTHER
        if name.startswith(OF_BACKWARD):
            forward = part_by_number.get(args.get("Sequence number", -1), BACKWARD)
            part = f"{BACKWARD}: {forward}" if forward != BACKWARD else (outer if stack else BACKWARD)
        elif event["cat"] == "user_annotation" and name in REGIONS:
            part = f"{BACKWARD}: {name}" if outer.startswith(BACKWARD) else name  # a block that backward recomputes
        computes = event["cat"] == "cpu_op" and "::" in name and not name.startswith(NOT_COMPUTING)
        end = event["ts"] + event["dur"]
        stack.append((min(end, stack[-1][0]) if stack else end, part, name, computes))
    run_to(float("inf"))
    return spans


def _share_out(layers: Sequence[Iterable[Span]], windows: list[tuple[float, float]]) -> Counter[str]:
    """The total length of each part within ``windows``; every moment counts once.

    It counts for the first layer that has a span at that moment, there for the span that started last; for "other" if no
    layer has one.
    """
    edges: list[tuple[float, bool, int, Span | None]] = [
        (moment, opens, layer, span)
        for layer, spans in enumerate(layers)
        for span in spans
        for moment, opens in ((span.start, True), (span.end, False))
    ]
    edges += [(moment, opens, -1, None) for start, end in windows for moment, opens in ((start, True), (end, False))]
    active: list[list[Span]] = [[] for _ in layers]
    inside = 0
    totals: Counter[str] = Counter()
    at = 0.0
    for moment, opens, layer, span in sorted(edges, key=lambda edge: edge[:3]):
        if inside and moment > at:
            top = next((spans[-1] for spans in active if spans), None)
            totals[top.part if top else OTHER] += moment - at  # type: ignore[assignment]
        at = moment
        if span is None:
            inside += 1 if opens else -1
        elif opens:
            active[layer].append(span)
        else:
            active[layer].remove(span)
    return totals


def _replay(events: Iterable[Event]) -> Iterator[int]:
    """The change of allocated bytes by each memory event; allocations older than the trace are ignored."""
    sizes: dict[int, int] = {}
    for event in events:
        address, num_bytes = event["args"]["Addr"], event["args"]["Bytes"]
        if num_bytes > 0:
            sizes[address] = num_bytes
            yield num_bytes
        else:
            yield -sizes.pop(address, 0)
