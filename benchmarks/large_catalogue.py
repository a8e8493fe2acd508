"""A catalogue of millions of items end to end on this machine, killed in between, with times and memory beside the plan's.

    OMP_NUM_THREADS=1 python -m benchmarks.large_catalogue --items 20000000 --json benchmarks/results/large_catalogue_2cpu.json

A thousand users have seen every item once. `mme prepare` reads their events, processes train, are killed by SIGKILL after a
checkpoint, and resume from it; `mme evaluate` ranks all items for every user. The peak is the largest resident set of any process,
in GiB; `launcher.memory` predicts it without having seen the run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.json_file import write_json
from benchmarks.prepare import processor
from launcher.memory import evaluation_memory, step_memory, whole_checkpoint_bytes
from launcher.shape import Shape
from mme.config import load_config
from mme.devices import DEVICES
from mme.run.metrics_file import METRICS_FILE, read_metrics

USERS = 1_000
GIB = 2**30
LOOK_EVERY_S = 0.1
SETTINGS = [
    "model.num_tables=2",
    "model.num_blocks=1",
    "model.moe.num_experts=0",
    "data.max_seq_len=50",
    "data.batch_size=64",
    "data.eval_batch_size=8",
    "train.keep_checkpoints=1",
    "train.log_every=1",
]


def main(
    items: Annotated[int, typer.Option(min=10 * USERS, help="Items of the catalogue.")] = 1_000_000,
    width: Annotated[int, typer.Option(min=2, help="Total width of the tables.")] = 32,
    steps: Annotated[int, typer.Option(min=4, help="Training steps, with a checkpoint after half of them.")] = 100,
    processes: Annotated[int, typer.Option(min=2, help="Processes of the training.")] = 2,
    work: Annotated[Path, typer.Option(help="Folder for data and run; an earlier run there is removed.")] = Path(
        "runs/large-catalogue"
    ),
    json_path: Annotated[Optional[Path], typer.Option("--json")] = None,  # noqa: UP045  (typer on Python 3.10)
) -> None:
    """Prints the figures and, with --json, writes them."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    events, data, run, settings = work / "events.parquet", work / "set", work / "run", work / "settings.yaml"
    settings.write_text(f"data: {{path: {data}}}\n")
    half = steps // 2
    overrides = [f"output_dir={run}", f"model.embedding_dim={width}", *SETTINGS]
    overrides += [f"train.steps={steps}", f"train.checkpoint_every={half}", f"train.eval_every={steps}"]
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    training = [*several, "-m", "mme", "train", "--config", str(settings), *overrides]
    write_events(events, items)
    config = load_config(settings, overrides)
    shape = Shape(config, processes, processes, items)
    phases = {
        "prepare": watch(["-m", "mme", "prepare", "--input", str(events), "--output", str(data)]),
        "train until SIGKILL": watch(training, run / "checkpoints" / f"step_{half}"),
        "resume, end, evaluate": watch(training),
        "evaluate on one process": watch(["-m", "mme", "evaluate", "--run", str(run)]),
    }
    lines = [line for line in read_metrics(run / METRICS_FILE) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    device = DEVICES["cpu"]
    result: dict[str, Any] = {
        "items": items,
        "width": width,
        "processes": processes,
        "steps": steps,
        "settings": SETTINGS,
        "processor": processor(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "step_ms": round(statistics.median(line["step_ms"] for line in lines), 1),
        "step_peak_gib": {
            "planned": round(step_memory(shape, device).total / GIB, 2),
            "measured": lines[-1]["peak_mem_gib"],
        },
        "evaluation_peak_gib": {
            "planned": round(evaluation_memory(Shape(config, 1, 1, items), device).total / GIB, 2),
            "measured": phases["evaluate on one process"]["peak_gib"],
        },
        "checkpoint_gib": {
            "planned": round(whole_checkpoint_bytes(shape) / GIB, 2),
            "measured": round(_bytes_below(run / "checkpoints" / f"step_{steps}") / GIB, 2),
        },
        "phases": phases,
    }
    table = Table("phase", "seconds", "peak GiB of a process")
    for name, phase in phases.items():
        table.add_row(name, f"{phase['seconds']:.0f}", f"{phase['peak_gib']:.2f}")
    Console().print(table)
    print({name: result[name] for name in ("step_ms", "step_peak_gib", "evaluation_peak_gib", "checkpoint_gib")})
    if json_path is not None:
        write_json(json_path, result)


def write_events(path: Path, num_items: int) -> None:
    """Every item once, in random order, spread evenly over the users."""
    number = np.arange(num_items)
    order = np.random.default_rng(0).permutation(num_items)
    pq.write_table(pa.table({"user_id": number % USERS, "item_id": order, "timestamp": 1_600_000_000 + number}), path)


def watch(arguments: list[str], until: Path | None = None) -> dict[str, float]:
    """Seconds and peak of a Python command; with ``until``, all its processes are killed once that path exists."""
    started = time.perf_counter()
    child = psutil.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        processes = _with_children(child)
        peak = max([peak, *map(_peak_kib, processes)])
        if until is not None and until.exists():
            for process in processes:
                process.kill()
            child.wait()
            break
        time.sleep(LOOK_EVERY_S)
    if child.returncode and until is None:
        raise SystemExit(f"{' '.join(arguments)} ended with status {child.returncode}")
    if until is not None and not until.exists():
        raise SystemExit(f"{' '.join(arguments)} ended before {until} existed")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(peak / 2**20, 2)}


def _with_children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _peak_kib(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    typer.run(main)
