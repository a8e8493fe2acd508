"""Training throughput of a configuration, where its time goes, and how it compares with padded eager FuXi-α.

    python -m benchmarks.train_throughput                                     # the quick start
    python -m benchmarks.train_throughput --config F.yaml --processes 4 model.num_blocks=4
    python -m benchmarks.train_throughput --data datasets/ml-latest-small --setting fuxi-alpha --json out.json

Starts the processes with torchrun and runs whole training steps (data, lookup, forward, loss, backward, optimizers). Tokens
are trained positions; none is padding. Figures are medians over repetitions of a fixed number of steps. `benchmarks.padded_fuxi`,
FuXi-α with the same widths, blocks, batches and negatives, alternates with them; each process has a copy and exchanges no
gradients. The ratio compares tokens per second, and tokens per second of CPU time, which other programs disturb less. Some more
steps are profiled (`mme.profiling.profile`) for the time by part, and one checkpoint is written.

Model FLOPs utilisation is the rate of the FLOPs that `mme.flops` counts over the true lengths, forward and backward, as a share of
the rate that all processes reach together in large matrix products.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.json_file import write_json
from launcher.job import default_processes
from mme.config import load_config
from mme.errors import UserError
from mme.prepare.synthetic import prepare_synthetic
from mme.run.exit_status import job_status

if TYPE_CHECKING:
    from mme.data.batch import SequenceBatch
    from mme.training import Training

RESULT = "MME_THROUGHPUT_RESULT"  # names the file to which the worker of rank 0 writes its figures

EMBEDDED = Path("datasets/quickstart")
WARM_UP_STEPS = 2  # before the profiled ones

# The setting of the public FuXi-α code for ML-1M (arXiv 2502.03036): one table, dense FFN, 128 negatives per token.
SETTINGS: dict[str, list[str]] = {
    "quickstart": [],
    "fuxi-alpha": [
        "model.num_tables=1",
        "model.embedding_dim=50",
        "model.num_blocks=2",
        "model.num_heads=1",
        "model.ffn_multiplier=1",
        "model.dropout=0.2",
        "model.moe.num_experts=0",
        "data.max_seq_len=200",
        "data.batch_size=64",
        "data.protocol=leave_one_out",
        "loss.negatives=per_token",
        "loss.num_negatives=128",
    ],
}


class Rate(NamedTuple):
    """Trained tokens and FLOPs of all ranks in one repetition, per second and per second of CPU time."""

    tokens_per_s: float
    flops_per_s: float
    tokens_per_cpu_s: float
    flops_per_cpu_s: float


def main(
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key.path=value")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="Prepared data set. Default: that of the configuration.")] = None,  # noqa: UP045
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "quickstart",
    config: Annotated[Path, typer.Option(help="Configuration file.")] = Path("configs/quickstart.yaml"),
    processes: Annotated[Optional[int], typer.Option(help="Default: one per GPU, or 2 without GPUs.", min=1)] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(help="Steps of one repetition.", min=1)] = 10,
    repetitions: Annotated[int, typer.Option(help="Repetitions after a warm-up.", min=1)] = 5,
    padded_steps: Annotated[int, typer.Option(help="Steps of padded FuXi-α in each turn; 0 leaves it out.", min=0)] = 2,
    profiled_steps: Annotated[int, typer.Option(help="Steps for the time by part; 0 leaves it out.", min=0)] = 5,
    output: Annotated[Optional[Path], typer.Option("--json", help="File to write the figures to.")] = None,  # noqa: UP045
) -> None:
    """Measures training throughput and prints it."""
    from benchmarks.prepare import processor  # imported here, because DuckDB would count as memory of the workers

    with job_status():
        if setting not in SETTINGS:
            raise UserError(f"--setting {setting}: expected one of {', '.join(SETTINGS)}")
        options = [*SETTINGS[setting], *(overrides or []), *([f"data.path={data}"] if data else [])]
        path = Path(load_config(config, options).data.path)
    if path == EMBEDDED and not path.exists():
        prepare_synthetic("quickstart", path)
    processes = processes or default_processes()
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        counts = [str(count) for count in (steps, repetitions, padded_steps, profiled_steps)]
        worker = [str(config), *counts, *options, f"output_dir={folder}/run", "train.epochs=1000", "train.steps=null"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
        subprocess.run(
            [*command, "-m", "benchmarks.train_throughput", *worker],
            check=True,
            env=environment | {RESULT: str(result_file), "PYTHONWARNINGS": "ignore"},  # hides warnings of libraries
        )
        result = json.loads(result_file.read_text())
    result |= {"setting": setting, "overrides": options, "processes": processes, "processor": processor()}
    _print(result)
    if output:
        write_json(output, result)


def run_worker(arguments: list[str]) -> None:
    """Runs one rank of the measurement."""
    import torch

    from benchmarks.roofline import matrix_rate
    from mme.data.dataset import PreparedDataset
    from mme.distributed.world import process_group
    from mme.run.preemption import Preemption
    from mme.training import Training

    config = load_config(Path(arguments[0]), arguments[5:])
    steps, repetitions, padded_steps, profiled_steps = map(int, arguments[1:5])
    with process_group() as world:
        training = Training(config, PreparedDataset.open(config.data.path, config.data.cache_dir), world, Preemption())
        measured = _Measured(training)
        measured.run(steps)
        memory = [_memory_gib("VmRSS")]
        rates = [measured.run(steps)]
        memory.append(_memory_gib("VmRSS"))
        peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else _memory_gib("VmHWM")
        parts = measured.profile(profiled_steps) if profiled_steps else {}
        checkpoint = measured.checkpoint()
        padded = []
        turn = measured.padded(padded_steps) if padded_steps else None
        for _ in range(repetitions - 1):
            if turn:
                padded.append(turn())
            rates.append(measured.run(steps))
        if turn:
            padded.append(turn())
        precision = getattr(torch, config.train.precision_on(world.device.type))
        matrix_flops = world.sum(torch.tensor(1e12 * matrix_rate(world.device, precision, 0.5)).to(world.device)).item()
        if world.rank == 0:
            counted = config.model.block == "fuxi"  # the only block that `mme.flops` counts
            flops_per_s = statistics.median(rate.flops_per_s for rate in rates) if counted else 0.0
            of_cpu_time = None
            if (
                counted and world.device.type == "cpu" and torch.get_num_threads() == 1
            ):  # each process has one core, as for the rate of matrix products
                of_cpu_time = statistics.median(rate.flops_per_cpu_s for rate in rates) / (matrix_flops / world.size)
            result: dict[str, Any] = {
                "tokens_per_s": statistics.median(rate.tokens_per_s for rate in rates),
                "tokens_per_s_all": [round(rate.tokens_per_s, 1) for rate in rates],
                "tokens_per_cpu_s_all": [round(rate.tokens_per_cpu_s, 1) for rate in rates],
                "waiting_share": measured.waited_s / measured.all_s,  # share of the time spent waiting for data
                "gflops_per_s": flops_per_s / 1e9 if counted else None,
                "matrix_gflops_per_s": matrix_flops / 1e9,
                "model_flops_utilisation": flops_per_s / matrix_flops if counted else None,
                "utilisation_of_cpu_time": of_cpu_time,
                "steps": steps * repetitions,
                "rss_gib_after_warm_up": round(memory[0], 3),
                "rss_gib_at_end": round(memory[-1], 3),
                "peak_mem_gib": round(peak, 3),
                "checkpoint": checkpoint,
                **parts,
                **_against(rates, padded),
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
            }
            Path(os.environ[RESULT]).write_text(json.dumps(result))


class _Measured:
    """Runs and times the steps of one training job, as `Training.run` makes them."""

    def __init__(self, training: Training) -> None:
        self.training, self.world = training, training.world
        self.stream = training.loader.stream()
        self.done = 0
        self.waited_s = self.all_s = 0.0

    def run(self, steps: int) -> Rate:
        started, cpu_started, tokens, flops = time.perf_counter(), time.process_time(), 0, 0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.stream).sequences
            self.waited_s += time.perf_counter() - asked
            tokens += self._step(batch)
            flops += self.flops(batch)
        seconds = time.perf_counter() - started
        self.all_s += seconds
        return self._rate(tokens, flops, seconds, time.process_time() - cpu_started)

    def flops(self, batch: SequenceBatch) -> int:
        """FLOPs of this rank's part of a step."""
        from mme.flops import training_flops

        lengths = batch.seq_offsets.diff()
        pairs = int((lengths * (lengths + 1)).sum()) // 2
        counts = training_flops(self.training.config, batch.num_tokens, pairs, self.training.dataset.num_items)
        return sum(counts.values())

    def profile(self, steps: int) -> dict[str, Any]:
        """Time by part of some more steps of rank 0; empty on other ranks."""
        from mme.profiling.profile import StepProfile
        from mme.profiling.regions import region

        profile = None
        if self.world.rank == 0:
            folder = Path(self.training.config.output_dir) / "profile"
            profile = StepProfile(steps, WARM_UP_STEPS, folder, 0, self.world.device, lambda _: None)
        with profile or nullcontext():
            for _ in range(WARM_UP_STEPS + steps):
                with region("data"):
                    batch = next(self.stream).sequences
                self._step(batch)
                if profile:
                    profile.step()
        if profile is None or profile.result is None:
            return {}
        found = profile.result
        return {
            "profile": asdict(found) | {"percent": found.percent()},
            "exposed_communication_share": found.parts_ms.get("exchange", 0.0) / found.step_ms,
        }

    def checkpoint(self) -> dict[str, float]:
        """How long one checkpoint interrupts training, and after what time it is complete."""
        from mme.distributed.checkpoint_index import Progress
        from mme.distributed.checkpoint_writer import CheckpointWriter

        started = time.perf_counter()
        with CheckpointWriter(Path(self.training.config.output_dir), self.training.recommender, keep=1) as writer:
            writer.save(Progress(self.done, 0, 0))
            held_up = time.perf_counter() - started
        return {"held_up_ms": 1000 * held_up, "complete_after_ms": 1000 * (time.perf_counter() - started)}

    def padded(self, steps: int) -> Callable[[], Rate]:
        """Returns a function that runs one turn of padded FuXi-α on the next batches; a first step warms up."""
        import torch

        from benchmarks.padded_fuxi import PaddedFuxi

        config = self.training.config
        torch.manual_seed(config.train.seed)
        model = PaddedFuxi(config, self.training.dataset.num_items).to(self.world.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.train.lr, betas=(0.9, 0.98), weight_decay=0.0)

        def turn(steps: int = steps) -> Rate:
            started, cpu_started, tokens = time.perf_counter(), time.process_time(), 0
            for _ in range(steps):
                batch = next(self.stream).sequences.to(self.world.device)
                optimizer.zero_grad()
                model(batch).backward()
                optimizer.step()
                tokens += batch.num_tokens
            everywhere = int(self.world.sum(torch.tensor(tokens, device=self.world.device)))
            return self._rate(everywhere, 0, time.perf_counter() - started, time.process_time() - cpu_started)

        turn(1)
        return turn

    def _step(self, batch: SequenceBatch) -> int:
        """Trains on ``batch``; returns the trained tokens of all ranks."""
        self.done += 1
        return self.training.step(self.done, batch).tokens

    def _rate(self, tokens: int, flops: int, seconds: float, cpu_s: float) -> Rate:
        """``tokens`` are those of all ranks; ``flops`` and ``cpu_s`` are those of this rank."""
        import torch

        summed = torch.tensor([float(flops), cpu_s], dtype=torch.float64, device=self.world.device)
        flops_everywhere, cpu_s_everywhere = self.world.sum(summed).tolist()
        return Rate(
            tokens / seconds,
            flops_everywhere / seconds,
            tokens / cpu_s_everywhere,
            flops_everywhere / cpu_s_everywhere,
        )


def _against(rates: list[Rate], padded: list[Rate]) -> dict[str, Any]:
    """Compares our rates with those of padded FuXi-α, whose turns alternate with ours."""
    if not padded:
        return {}
    pairs = list(zip(rates, padded, strict=True))
    by_wall = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
    by_cpu = [ours.tokens_per_cpu_s / theirs.tokens_per_cpu_s for ours, theirs in pairs]
    return {
        "padded_fuxi_alpha": {
            "tokens_per_s_all": [round(rate.tokens_per_s, 1) for _, rate in pairs],
            "ratio": statistics.median(by_wall),
            "ratio_all": [round(ratio, 2) for ratio in by_wall],
            "ratio_of_cpu_time": statistics.median(by_cpu),
            "ratio_of_cpu_time_all": [round(ratio, 2) for ratio in by_cpu],
        }
    }


def _memory_gib(name: str) -> float:
    """A figure of this process from /proc in GiB: VmRSS, the resident set, or VmHWM, its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2**20


def _print(result: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table(
        title=f"training throughput, {result['setting']}, {result['processes']} processes on {result['device']}"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    rates, checkpoint = result["tokens_per_s_all"], result["checkpoint"]
    table.add_row("tokens/s", f"{result['tokens_per_s']:,.0f} ({min(rates):,.0f} – {max(rates):,.0f})")
    table.add_row("waiting for data", f"{result['waiting_share']:.2%}")
    if "profile" in result:
        table.add_row("exposed communication", f"{result['exposed_communication_share']:.2%}")
    if result["model_flops_utilisation"]:
        of = f"{result['gflops_per_s']:,.0f} of {result['matrix_gflops_per_s']:,.0f} GFLOP/s"
        table.add_row("model FLOPs utilisation", f"{result['model_flops_utilisation']:.1%} ({of})")
    if result["utilisation_of_cpu_time"]:
        table.add_row("the same by CPU time", f"{result['utilisation_of_cpu_time']:.1%}")
    table.add_row("peak memory of rank 0", f"{result['peak_mem_gib']:.2f} GiB")
    table.add_row(
        "resident, after warm-up and later", f"{result['rss_gib_after_warm_up']}, {result['rss_gib_at_end']} GiB"
    )
    table.add_row("a checkpoint interrupts training for", f"{checkpoint['held_up_ms']:.0f} ms")
    if padded := result.get("padded_fuxi_alpha"):
        for name, key in (("tokens/s", "ratio"), ("tokens per CPU second", "ratio_of_cpu_time")):
            every = padded[f"{key}_all"]
            table.add_row(f"times padded FuXi-α, {name}", f"{padded[key]:.1f} ({min(every):.1f} – {max(every):.1f})")
    console.print(table)
    if "profile" in result:
        from mme.profiling.profile import time_table
        from mme.profiling.trace import TimeByPart

        figures = {field.name: result["profile"][field.name] for field in fields(TimeByPart)}
        console.print(time_table(TimeByPart(**figures)))


if __name__ == "__main__":
    if RESULT in os.environ:
        run_worker(sys.argv[1:])
    else:
        typer.run(main)
