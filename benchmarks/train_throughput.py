"""Training throughput of a configuration: tokens a second, and whether memory grows with the number of steps.

    python -m benchmarks.train_throughput --data datasets/quickstart
    python -m benchmarks.train_throughput --data datasets/ml-latest-small --setting fuxi-alpha --json out.json

Starts the processes by torchrun, runs whole training steps (data, lookup, forward, loss, backward, optimizers) and counts
the trained tokens, which are all real: nothing is padded. The figure is the median over repetitions of a fixed number of
steps; memory is the resident set of rank 0 before the first and after the last repetition.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from mme.config import load_config
from mme.data.synthetic import prepare_synthetic

RESULT = "MME_THROUGHPUT_RESULT"  # where the worker of rank 0 leaves its figures

EMBEDDED = Path("datasets/quickstart")

# The public FuXi-α code's setting for ML-1M (arXiv 2502.03036): one table, dense FFN, 128 negatives for each token.
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


def main(
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key.path=value")] = None,  # noqa: UP045
    data: Annotated[Path, typer.Option(help="Prepared data set; the embedded one is made if missing.")] = EMBEDDED,
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(SETTINGS)}.")] = "quickstart",
    config: Annotated[Path, typer.Option(help="Configuration file.")] = Path("configs/quickstart.yaml"),
    processes: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Steps of one repetition.", min=1)] = 10,
    repetitions: Annotated[int, typer.Option(help="Repetitions after one that warms up.", min=1)] = 5,
    output: Annotated[Optional[Path], typer.Option("--json", help="Where to write the figures.")] = None,  # noqa: UP045
) -> None:
    """Measures and prints training throughput."""
    options = [f"data.path={data}", *SETTINGS[setting], *(overrides or [])]
    load_config(config, options)
    if data == EMBEDDED and not data.exists():
        prepare_synthetic("quickstart", data)
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        worker = [str(config), str(steps), str(repetitions), *options, f"output_dir={folder}/run"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
        subprocess.run(
            [*command, "-m", "benchmarks.train_throughput", *worker],
            check=True,
            env=environment | {RESULT: str(result_file)},
        )
        result = json.loads(result_file.read_text())
    result |= {"setting": setting, "overrides": options, "processes": processes, "processor": _processor()}
    _print(result)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


def run_worker(arguments: list[str]) -> None:
    """One rank of the measurement."""
    import psutil
    import torch

    from mme.data.dataset import PreparedDataset
    from mme.distributed.groups import process_group
    from mme.preemption import Preemption
    from mme.train import Training

    config_file, steps, repetitions, *overrides = arguments
    config = load_config(Path(config_file), [*overrides, "train.epochs=1000"])
    with process_group() as world:
        training = Training(config, PreparedDataset.open(config.data.path, config.data.cache_dir), world, Preemption())
        batches = training.loader.stream()
        rates, memory, waited_s, all_s = [], [], 0.0, 0.0
        for repetition in range(int(repetitions) + 1):
            started, tokens = time.perf_counter(), 0
            for step in range(int(steps)):
                asked = time.perf_counter()
                batch = next(batches).sequences
                waited_s += time.perf_counter() - asked
                tokens += training.step(repetition * int(steps) + step, batch).tokens
            rates.append(tokens / (time.perf_counter() - started))
            all_s += time.perf_counter() - started
            memory.append(psutil.Process().memory_info().rss / 2**30)
        if world.rank == 0:
            result: dict[str, Any] = {
                "tokens_per_s": statistics.median(rates[1:]),
                "tokens_per_s_all": [round(rate, 1) for rate in rates[1:]],
                "waiting_share": waited_s / all_s,  # of the time, for the data
                "steps": int(steps) * int(repetitions),
                "rss_gib_after_warm_up": round(memory[0], 3),
                "rss_gib_at_end": round(memory[-1], 3),
                "torch": torch.__version__,
                "device": str(world.device),
            }
            Path(os.environ[RESULT]).write_text(json.dumps(result))


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"training throughput, {result['setting']}, {result['processes']} processes")
    for column in ("tokens/s", "lowest", "highest", "waiting for data", "GiB after warm-up", "GiB at the end"):
        table.add_column(column, justify="right")
    rates = result["tokens_per_s_all"]
    table.add_row(
        f"{result['tokens_per_s']:,.0f}",
        f"{min(rates):,.0f}",
        f"{max(rates):,.0f}",
        f"{result['waiting_share']:.2%}",
        str(result["rss_gib_after_warm_up"]),
        str(result["rss_gib_at_end"]),
    )
    Console().print(table)


if __name__ == "__main__":
    if RESULT in os.environ:
        run_worker(sys.argv[1:])
    else:
        typer.run(main)
