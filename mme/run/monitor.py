"""Shows and records a run: the progress line, metrics.jsonl, log.txt and the curves of `mme.run.trackers`.

Each rank has one Monitor. Rank 0 shows and writes everything; the other ranks only write their own log file
(``log.rank1.txt``, …). Every line is flushed as it is written, so that a run that dies loses none.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mme import __version__
from mme.errors import UserError, one_line
from mme.files import make_folder, open_to_append
from mme.run.expert_load import greedy_experts, starved_experts
from mme.run.metrics_file import METRICS_FILE, keep_lines_until, name_in_errors
from mme.run.repeats import LibraryLog, RepeatLimit
from mme.run.trackers import TrackedRun, Trackers

PACKAGES = ["torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "triton", "numpy", "pyarrow"]
PLAIN_LINE_EVERY_S = 10.0
REDRAW_EVERY_S = 0.25
# An expert is starved if all views of a block together send it less than this fraction of an even share.
# An expert takes nearly all tokens if it gets more than this fraction of its maximum, 1 / top_k.


class Monitor:
    """Shows and records one training run.

    Call `run_info` once at the start, `resume_at` when resuming from a checkpoint, `train_step` after every optimizer step,
    `evaluation` and `experts` when there are results, and `close` (or use ``with``) at the end.

    Args:
        output_dir: the run's folder; created if it is missing.
        total_steps: the step at which training will stop.
        rank, world_size: this process among its peers.
        log_every: steps between lines of metrics.
        trackers: names of the trackers that receive the curves, see `mme.run.trackers`.
        settings: the configuration's values by full key, for the trackers.
        console: where progress is shown; default: standard output.
        clock: returns seconds since any fixed moment.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        log_every: int = 10,
        trackers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.total_steps = total_steps
        self.rank, self.world_size, self.log_every = rank, world_size, log_every
        self._clock = clock
        self._resume_step = 0
        self._metrics: Any = None
        self._tracker_names, self._settings = trackers, settings or {}
        self._trackers = Trackers(self.warn)
        self._warned: set[Hashable] = set()  # kinds of warnings already given
        self._constant: set[tuple[Any, Any]] = set()
        self._window_tokens: Any = 0
        self._window_s, self._window_steps = 0.0, 0
        self._started: tuple[float, int] | None = None  # the clock and the step at the end of the first step
        self._shown = -math.inf
        self._use = ""  # of the devices, according to the last line of metrics
        try:
            make_folder(self.output_dir, self.output_dir)
            log_name = "log.txt" if rank == 0 else f"log.rank{rank}.txt"
            self._log = open_to_append(self.output_dir / log_name, self.output_dir)
            self._log_path = self.output_dir / log_name
        except OSError as error:
            raise UserError(
                f"output_dir {error.filename}: {error.strerror}: expected a folder that can be made"
            ) from error
        self._library_log = LibraryLog(self._log)
        logging.getLogger().addHandler(self._library_log)
        self._repeats = RepeatLimit()
        self._console = console or Console()
        self._progress: Progress | None = None
        if rank == 0 and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(bar_width=10),
                TextColumn("{task.description}"),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._progress.add_task("starting", total=total_steps)
            self._progress.start()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error is not None)

    def resume_at(self, step: int, total_steps: int) -> None:
        """Continues after ``step`` until ``total_steps``: drops the lines of later steps from metrics.jsonl and appends to it.

        Without this call, or with step 0, metrics.jsonl starts empty.
        """
        if self._metrics is not None:
            raise RuntimeError("resume_at comes before the first record")
        self._resume_step, self.total_steps = step, total_steps
        if self._progress is not None:
            self._progress.update(self._task, total=total_steps)
        if step:
            self.note(f"resumed at step {step:,}")

    def run_info(self, info: Mapping[str, Any]) -> None:
        """Records facts about the run, such as ``device`` and ``parameters`` (part → count).

        Adds step, time, host, command, Python and package versions, and world_size.
        """
        if self.rank == 0:
            parameters = sum(info.get("parameters", {}).values())
            processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
            place = f"{processes} on {info.get('device', 'an unknown device')}"
            self.note(f"{self.output_dir}: {parameters:,} parameters, {place}, {self.total_steps:,} steps")
        self._write(
            {
                "kind": "run",
                "step": self._resume_step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": platform.node(),
                "command": _command_line(),
                "world_size": self.world_size,
                "versions": _versions(),
                **info,
            }
        )

    def is_line_due(self, step: int) -> bool:
        """Whether a line of metrics follows this step."""
        return step % self.log_every == 0 or step == self.total_steps

    def train_step(
        self,
        step: int,
        epoch: int,
        *,
        loss: SupportsFloat,
        tokens: Any,
        step_s: float,
        lr: float,
        extra: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Counts one optimizer step; writes a line of metrics every ``log_every`` of them.

        Args:
            step: number of optimizer steps done, including this one.
            epoch: number of the current pass over the data, from 0.
            loss: loss of this step over all ranks; a tensor is read only when a line is written or shown.
            tokens: target tokens of this step on all ranks.
            step_s: seconds that the step took.
            extra: other figures of this step, such as grad_norm.
        """
        if self.rank != 0:
            return
        self._window_tokens = self._window_tokens + tokens
        self._window_s += step_s
        self._window_steps += 1
        if self._started is None:
            self._started = (self._clock(), step)
        rate = float(self._window_tokens) / self._window_s if self._window_s > 0 else 0.0
        if self.is_line_due(step):
            # The loss of this step, not a mean over several: a run that resumes between two lines then writes the same
            # bits as one that was never stopped.
            value = float(loss)
            record: dict[str, Any] = {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "loss": value,
                "tokens_per_s": round(rate, 1),
                "lr": lr,
                "step_ms": round(1000 * self._window_s / self._window_steps, 3),
            }
            record.update({name: _number(value) for name, value in (extra or {}).items()})
            self._write(record)
            if not math.isfinite(value):
                self.warn(f"the loss at step {step:,} is {value}")
            self._trackers.log(
                step, {f"train/{name}": value for name, value in record.items() if name not in _NO_SCALAR}
            )
            self._window_tokens, self._window_s, self._window_steps = 0, 0.0, 0
            self._use = _use(record)
        self._show(step, epoch, loss, rate)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Records the metrics of one model on one split, with keys as metrics.jsonl has them (model, split, …)."""
        if self.rank != 0:
            return
        record = {name: _number(value) for name, value in record.items()}
        self._write({"kind": "eval", **record})
        metrics = {name: value for name, value in record.items() if name == "mrr" or "@" in name}
        place = f"eval/{record.get('model')}/{record.get('split')}"
        self._trackers.log(int(record.get("step", 0)), {f"{place}/{name}": value for name, value in metrics.items()})
        if (seen := (record.get("model"), record.get("split"))) in self._constant:
            return
        if record.get("model") == "popularity":  # the same at every step, so written once
            self._constant.add(seen)
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.note(f"step {record.get('step', 0):,}  {record.get('split')}  {record.get('model')}  {figures}")

    def experts(
        self,
        step: int,
        load: list[list[list[float]]],
        entropy: list[list[float]] | None = None,
        blocks: Sequence[int] | None = None,
        dropped: list[list[float]] | None = None,
        *,
        top_k: int = 1,
    ) -> None:
        """Records how the routers distribute the tokens.

        Args:
            load: [block][view][expert], the share of the view's routed tokens that went to the expert.
            entropy: [block][view], the mean entropy of the router's probabilities, in nats.
            blocks: the indices of these blocks in the decoder; default: all, in order.
            dropped: [block][view], the share of the routed tokens whose expert was full; None: nothing is dropped.
            top_k: experts per token; 1 / top_k is the most that one expert can get.
        """
        if self.rank != 0:
            return
        blocks = range(len(load)) if blocks is None else blocks
        record: dict[str, Any] = {"kind": "experts", "step": step, "blocks": list(blocks), "load": load}
        if entropy is not None:
            record["entropy"] = entropy
        if dropped is not None:
            record["dropped"] = dropped
        self._write(record)
        scalars = {}
        for block, views in zip(blocks, load, strict=True):
            for view, shares in enumerate(views):
                scalars[f"experts/largest_share/block{block}_view{view}"] = max(shares)
                scalars[f"experts/smallest_share/block{block}_view{view}"] = min(shares)
        for name, values in {"entropy": entropy, "dropped": dropped}.items():
            for block, by_view in zip(blocks, values or [], strict=False):
                for view, value in enumerate(by_view):
                    scalars[f"experts/{name}/block{block}_view{view}"] = value
        self._trackers.log(step, scalars)
        for block, expert, share in starved_experts(load):
            found = f"gets {share:.2%} of the tokens at step {step:,}"
            self.warn_once(("starved", block, expert), f"warning: expert {expert} of block {blocks[block]} {found}")
        for block, expert, share in greedy_experts(load, top_k):
            found = f"takes {share:.1%} of the tokens, of {1 / top_k:.0%} possible, at step {step:,}"
            self.warn_once(("greedy", block, expert), f"warning: expert {expert} of block {blocks[block]} {found}")

    def warn(self, text: str) -> None:
        """Notes a warning. A repeated one is noted at its 10th, 100th, … occurrence, with the count."""
        if (line := self._repeats.line(f"warning: {text}")) is not None:
            self.note(line)

    def warn_once(self, kind: Hashable, text: str) -> None:
        """Notes a line, the first time that this ``kind`` occurs in this process."""
        if kind not in self._warned:
            self._warned.add(kind)
            self.note(text)

    def note(self, text: str) -> None:
        """Writes one line to this rank's log; rank 0 also shows it."""
        text = one_line(text)
        with name_in_errors(self._log_path):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.rank == 0:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, failed: bool = False) -> None:
        """Ends the progress line and closes trackers and files; safe to call twice. ``failed`` is told to the trackers."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        logging.getLogger().removeHandler(self._library_log)
        self._trackers.close(failed)
        for stream in (self._metrics, self._log):
            if stream is not None:
                with suppress(OSError):  # every line was flushed when it was written, so nothing is lost
                    stream.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        if self._metrics is None:
            self._open()
        line = json.dumps({name: _finite(value) for name, value in record.items()})
        with name_in_errors(self.output_dir / METRICS_FILE):
            self._metrics.write(line + "\n")

    def _open(self) -> None:
        """Starts the trackers and opens metrics.jsonl with the first record, when the step to resume at is known."""
        run = TrackedRun(self.output_dir, self._settings, self._resume_step)
        for place in self._trackers.start(self._tracker_names, run):
            self.note(place)
        path = self.output_dir / METRICS_FILE
        keep_lines_until(path, self._resume_step)
        self._metrics = open_to_append(path, self.output_dir)

    def _show(self, step: int, epoch: int, loss: SupportsFloat, rate: float) -> None:
        now = self._clock()
        every = REDRAW_EVERY_S if self._progress is not None else PLAIN_LINE_EVERY_S
        if now - self._shown < every and step != self.total_steps:
            return
        self._shown = now
        figures = (
            f"epoch {epoch}  loss {float(loss):.4f}  {_short(rate)} tokens/s{self._use}  {self._time_left(step, now)}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=figures, refresh=True)
        else:
            self.note(f"step {step:,}/{self.total_steps:,}  {figures}")

    def _time_left(self, step: int, now: float) -> str:
        """Time left of the whole run, with evaluations, at the speed measured since the first step of this process."""
        assert self._started is not None
        start, first_step = self._started
        if step >= self.total_steps:
            return f"done in {duration(now - start)}"
        if step == first_step:
            return "time left: …"
        return f"{duration((now - start) / (step - first_step) * (self.total_steps - step))} left"


_NO_SCALAR = {"kind", "step"}


def duration(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: Any) -> Any:
    """The value of a tensor or NumPy scalar as a plain number; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _use(record: Mapping[str, Any]) -> str:
    """Utilisation, memory and exposed communication for the progress line, as far as the record has them."""
    parts = {"mfu": "MFU {:.1%}", "peak_mem_gib": "{:.1f} GiB", "exposed_communication": "waits {:.0%}"}
    return "".join(f"  {text.format(record[name])}" for name, text in parts.items() if name in record)


def _short(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"


def _command_line() -> str:
    program = Path(sys.argv[0]).name if sys.argv else "python"
    program = "python -m mme" if program == "__main__.py" else program
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def _versions() -> dict[str, str]:
    found = {"mme": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
