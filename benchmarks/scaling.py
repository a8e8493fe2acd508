"""How does training scale? Measured on CPU processes, predicted for GPUs.

    python -m benchmarks.scaling --json benchmarks/raw/scaling_cpu.json --summary benchmarks/results/scaling_cpu.json
    python -m benchmarks.scaling --no-measure --config configs/ml-20m.yaml --items 26744

The measurement takes whole training steps of `benchmarks.train_throughput` with 1, 2 and 4 processes of one thread each, once with
a fixed total batch and once with a batch that grows with the processes. The prediction uses the models of `launcher.plan` for 8 to
1,024 GPUs, in the layout that the plan chooses, for a batch that grows with the GPUs and for the batch of 8 GPUs split among more.
It also gives the number of GPUs from which a part takes more time than any other, with and without the host's time, which is a
guess. Efficiency is the rate per process or GPU relative to that of the smallest number.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.json_file import write_json
from launcher.job import items_of
from launcher.plan import ParallelLayout, assumptions, choice, layouts
from launcher.shape import Shape
from mme.config import Config, load_config
from mme.devices import DEVICES, Device
from mme.run.exit_status import job_status

PROCESSES = (1, 2, 4)
MARKS = ("largest_part_from", "largest_part_beside_the_host_from")
TOTAL_SEQUENCES, SEQUENCES_EACH = 128, 64  # per step if the work is fixed; per process if it grows
GPUS_OF_A_NODE = 8
GPUS = [8 * 2**doublings for doublings in range(8)]  # to 1,024
KINDS = ("a100-80g", "h100-80g")
KUAIRAND, KUAIRAND_ITEMS = Path("configs/kuairand-27k.yaml"), 32_038_725


def main(
    measure: Annotated[bool, typer.Option(help="Measure the quick start on this machine.")] = True,
    steps: Annotated[int, typer.Option(help="Steps of a repetition.", min=1)] = 5,
    repetitions: Annotated[int, typer.Option(help="Repetitions after a warm-up.", min=2)] = 7,
    config: Annotated[Path, typer.Option(help="Configuration to predict.")] = KUAIRAND,
    items: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Items of the catalogue. Default: those of KuaiRand-27K or, with another --config, of its data set.",
            min=1,
        ),
    ] = None,
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key.path=value for the prediction")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--json", help="File to write all figures to.")] = None,  # noqa: UP045
    brief: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--summary", help="File to write only the figures of the tables to."),
    ] = None,
) -> None:
    """Prints measured and predicted scaling."""
    with job_status():
        settings = load_config(config, overrides or [])
        known = KUAIRAND_ITEMS if config.resolve() == KUAIRAND.resolve() else None
        num_items = items or known or items_of(settings)
    console = Console(width=150)
    result: dict[str, Any] = {}
    if measure:
        load = os.getloadavg()[1]  # over the last five minutes, including other programs
        measured = [_measured(processes, sequences, steps, repetitions) for processes, sequences in _settings()]
        result["measured"] = {
            "cores": os.cpu_count(),
            "load_average_before": load,
            "setting": "quick start, one thread per process",
            "runs": measured,
            "fixed_work": _efficiency(measured, lambda run: run["processes"] * run["sequences"] == TOTAL_SEQUENCES),
            "growing_work": _efficiency(measured, lambda run: run["sequences"] == SEQUENCES_EACH),
        }
        for work in ("fixed_work", "growing_work"):
            console.print(_measured_table(work, result["measured"][work]))
    predicted = [
        _predicted(settings, num_items, DEVICES[kind], work)
        for kind in KINDS
        for work in ("growing work", "fixed work")
    ]
    for prediction in predicted:
        console.print(_predicted_table(prediction))
    result["predicted"] = {"config": str(config), "overrides": overrides or [], "items": num_items, "runs": predicted}
    for line in predicted[0]["assumptions"]:
        console.print(f"- {line}", highlight=False)
    if output:
        write_json(output, result)
    if brief:
        write_json(brief, summary(result))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of the tables, without the repetitions of measurements and the constants of devices."""
    predicted = result["predicted"]
    runs = [
        {
            "gpu": run["gpu"]["name"],
            "work": run["work"],
            **{key: {part: gpus for part, gpus in run[key].items() if gpus} for key in MARKS},
            "rows": [
                {key: round(row[key], 3) for key in ("gpus", "step_ms", "tokens_per_s", "efficiency")}
                | {"parts_ms": {part: round(found["ms"], 3) for part, found in row["parts"].items()}}
                for row in run["rows"]
            ],
        }
        for run in predicted["runs"]
    ]
    measured = {key: value for key, value in result.get("measured", {}).items() if key != "runs"}
    if measured:
        measured["versions"] = {key: result["measured"]["runs"][0][key] for key in ("torch", "device", "processor")}
    return {"measured": measured, "predicted": predicted | {"runs": runs}}


def _settings() -> list[tuple[int, int]]:
    """(processes, sequences per process) of all runs, without repetitions."""
    wanted = [(n, TOTAL_SEQUENCES // n) for n in PROCESSES] + [(n, SEQUENCES_EACH) for n in PROCESSES]
    return list(dict.fromkeys(wanted))


def _measured(processes: int, sequences: int, steps: int, repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        options = ["--processes", processes, "--steps", steps, "--repetitions", repetitions, "--json", file]
        command = [*options, "--padded-steps", 0, "--profiled-steps", 0, f"data.batch_size={sequences}"]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.train_throughput", *map(str, command)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        found = json.loads(file.read_text())
    keys = ("processes", "tokens_per_s_all", "tokens_per_cpu_s_all", "torch", "device", "processor")
    return {"sequences": sequences, **{key: found[key] for key in keys}}


def _efficiency(runs: list[dict[str, Any]], belongs: Any) -> list[dict[str, Any]]:
    """Median and quartiles of the rates of the runs that ``belongs`` selects, with speed-up and efficiency."""
    rows: list[dict[str, Any]] = []
    for run in sorted(filter(belongs, runs), key=lambda run: run["processes"]):
        lower, median, upper = statistics.quantiles(run["tokens_per_s_all"], n=4)
        row = {
            "processes": run["processes"],
            "sequences": run["sequences"],
            "tokens_per_s": median,
            "quartiles": [lower, upper],
            "tokens_per_cpu_s": statistics.median(run["tokens_per_cpu_s_all"]),
        }
        first = rows[0] if rows else row
        row["speed_up"] = median / first["tokens_per_s"]
        row["efficiency"] = row["speed_up"] * first["processes"] / run["processes"]
        row["efficiency_of_cpu_time"] = row["tokens_per_cpu_s"] / first["tokens_per_cpu_s"]
        rows.append(row)
    return rows


def _predicted(config: Config, items: int, device: Device, work: str) -> dict[str, Any]:
    """The plan's prediction for 8 to 1,024 GPUs, without numbers for which no layout fits or the work cannot be divided."""
    planned: list[ParallelLayout] = []
    for gpus in GPUS:
        dealt = _with_batch(config, gpus, work)
        if dealt is None:
            continue
        shape = Shape(dealt, gpus, GPUS_OF_A_NODE, items)
        layout = choice(layouts(shape, device), None, device)
        if layout.memory.fits(device):
            planned.append(layout)
    first = planned[0]
    rows = []
    for layout in planned:
        rate = layout.shape.ranks * layout.shape.tokens / layout.step_s
        alone = first.shape.tokens / first.step_s
        rows.append(
            {
                "gpus": layout.shape.ranks,
                "tokens_per_gpu": layout.shape.tokens,
                "layout": layout.overrides,
                "memory_gib": layout.memory.total / 2**30,
                "step_ms": 1e3 * layout.step_s,
                "tokens_per_s": rate,
                "efficiency": rate / layout.shape.ranks / alone,
                "parts": {name: {"ms": 1e3 * part.seconds, "bound": part.bound} for name, part in layout.time.items()},
            }
        )
    return {
        "gpu": asdict(device),
        "work": work,
        "rows": rows,
        "largest_part_from": _largest_from(rows),
        "largest_part_beside_the_host_from": _largest_from(rows, beside="host"),
        "assumptions": assumptions(first.shape, device),
    }


def _with_batch(config: Config, gpus: int, work: str) -> Config | None:
    """``config`` as it is, or with the tokens of 8 GPUs divided among all; None if each gets less than a sequence."""
    if work == "growing work":
        return config
    data = config.data
    each = GPUS[0] * (data.tokens_per_batch or data.batch_size * data.max_seq_len) // gpus
    return replace(config, data=replace(data, tokens_per_batch=each)) if each >= data.max_seq_len else None


def _largest_from(rows: list[dict[str, Any]], beside: str | None = None) -> dict[str, int | None]:
    """For each part, the least number of GPUs at which it takes more time than any other except ``beside``, or None."""
    found: dict[str, int | None] = dict.fromkeys(name for row in rows for name in row["parts"])
    for row in reversed(rows):
        parts = {name: part["ms"] for name, part in row["parts"].items() if name != beside}
        found[max(parts, key=parts.__getitem__)] = row["gpus"]
    return found


def _measured_table(work: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"measured, {work.replace('_', ' ')}: {os.cpu_count()} cores, gloo", title_justify="left")
    headings = (
        "processes",
        "sequences each",
        "tokens/s",
        "quartiles",
        "speed-up",
        "efficiency",
        "efficiency of CPU time",
    )
    _columns(table, headings)
    for row in rows:
        low, high = row["quartiles"]
        table.add_row(
            str(row["processes"]),
            str(row["sequences"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{low:,.0f} – {high:,.0f}",
            *(f"{row[key]:.2f}" for key in ("speed_up", "efficiency", "efficiency_of_cpu_time")),
        )
    return table


def _predicted_table(prediction: dict[str, Any]) -> Table:
    rows = prediction["rows"]
    title = f"predicted, not measured: {prediction['gpu']['name']}, {prediction['work']}; ms by part"
    table = Table(title=title, title_justify="left")
    _columns(table, ("GPUs", *(f"{row['gpus']:,}" for row in rows), "largest from", "without the host"))
    figures = {
        "tokens per GPU": ("tokens_per_gpu", "{:,}"),
        "step, ms": ("step_ms", "{:,.1f}"),
        "million tokens/s": ("tokens_per_s", "{:,.1f}"),
        "efficiency": ("efficiency", "{:.2f}"),
        "memory, GiB": ("memory_gib", "{:,.1f}"),
    }
    for name, (key, form) in figures.items():
        scale = 1e-6 if key == "tokens_per_s" else 1
        table.add_row(name, *(form.format(row[key] * scale if scale != 1 else row[key]) for row in rows), "", "")
    table.add_section()
    for name, gpus in prediction["largest_part_from"].items():
        times = (f"{row['parts'][name]['ms']:,.2f}" if name in row["parts"] else "" for row in rows)
        marks = (gpus, prediction["largest_part_beside_the_host_from"][name])
        table.add_row(name, *times, *("" if mark is None else f"{mark:,}" for mark in marks))
    return table


def _columns(table: Table, headings: Iterable[str]) -> None:
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")


if __name__ == "__main__":
    typer.run(main)
