"""How fast is `mme prepare`, and how much memory does it take, by the number of events?

    python -m benchmarks.prepare
    python -m benchmarks.prepare --millions 1 --millions 10 --millions 100 --json benchmarks/results/prepare_cpu.json

For each size it writes a log of events in the order of time, in Parquet files of at most 10 million rows. Users and items have
skewed popularity (on average 100 events per user and 1,000 per item), and one event in fifty is logged twice. It runs `mme prepare`
on the log in a separate process and records the elapsed time and the peak resident set of that process.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.json_file import write_json

ROWS_PER_FILE = 10_000_000
ROWS_AT_ONCE = 1_000_000
SECONDS_BETWEEN_LOOKS = 0.01
FIRST_SECOND = 1_600_000_000
PRIME = 1_000_003  # spreads the ids, so that id and popularity are independent


def main(
    millions: Annotated[Optional[list[float]], typer.Option(help="Millions of events; can be repeated.")] = None,  # noqa: UP045
    memory_limit: Annotated[str, typer.Option(help="Option of mme prepare.")] = "4GiB",
    min_item_events: Annotated[int, typer.Option(help="Option of mme prepare; above 1 it filters in rounds.")] = 1,
    folder: Annotated[Optional[Path], typer.Option(help="Work folder; takes about 60 bytes per event.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--json", help="File to write the figures to.")] = None,  # noqa: UP045
) -> None:
    """Measures the preparation of each size and prints the figures."""
    results = []
    for size in millions or [1, 10]:
        work = Path(tempfile.mkdtemp(dir=folder))
        try:
            results.append(measure(round(size * 1e6), work, memory_limit, min_item_events))
        finally:
            shutil.rmtree(work)
    _print(results)
    if output:
        about = {
            "processor": processor(),
            "memory_limit": memory_limit,
            "min_item_events": min_item_events,
            "duckdb": duckdb.__version__,
            "pyarrow": pa.__version__,
            "load_average": round(os.getloadavg()[0], 1),  # includes other programs
        }
        write_json(output, about | {"results": results})


def write_events(folder: Path, num_events: int) -> list[Path]:
    """Writes ``num_events`` rows (user_id, item_id, timestamp) in the order of time to Parquet files."""
    rng = np.random.default_rng(0)
    num_users, num_items = max(num_events // 100, 10), max(num_events // 1000, 10)
    paths: list[Path] = []
    for begin in range(0, num_events, ROWS_PER_FILE):
        path = folder / f"day-{len(paths):04d}.parquet"
        paths.append(path)
        end = min(begin + ROWS_PER_FILE, num_events)
        writer = None
        for first in range(begin, end, ROWS_AT_ONCE):
            size = min(ROWS_AT_ONCE, end - first)
            table = pa.table(
                {
                    "user_id": _skewed(rng, num_users, size, 2),
                    "item_id": _skewed(rng, num_items, size, 4),
                    "timestamp": FIRST_SECOND + (first + np.arange(size)) // 4,
                }
            )
            again = np.sort(np.concatenate([np.arange(size), rng.integers(size, size=size // 50)]))[:size]
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table.take(again))
        if writer is not None:
            writer.close()
    return paths


def _skewed(rng: np.random.Generator, number: int, size: int, power: int) -> np.ndarray:
    """Random ids of ``number`` things; the thing of popularity rank r has a share of about r^(1 / power - 1)."""
    return (number * rng.random(size) ** power).astype(np.int64) * PRIME % (1 << 40)


def measure(num_events: int, folder: Path, memory_limit: str, min_item_events: int) -> dict[str, Any]:
    """Prepares events in a separate process and returns its time and memory."""
    paths = write_events(folder, num_events)
    options = ["--memory-limit", memory_limit, "--min-item-events", str(min_item_events)]
    command = [sys.executable, "-m", "mme", "prepare", "--format", "parquet", *options, "--output", str(folder / "set")]
    started = time.perf_counter()
    child = subprocess.Popen([*command, "--input", *map(str, paths)], stdout=subprocess.DEVNULL)
    peak_rss_kib, ended = 0, 0
    while not ended:
        peak_rss_kib = max(peak_rss_kib, _peak_rss_kib(child.pid))
        time.sleep(SECONDS_BETWEEN_LOOKS)
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
    elapsed_s = time.perf_counter() - started
    if status:
        raise SystemExit(f"mme prepare ended with {os.waitstatus_to_exitcode(status)}")
    info = json.loads((folder / "set" / "dataset.json").read_text())
    return {
        "events": num_events,
        "elapsed_s": round(elapsed_s, 2),
        "events_per_s": round(num_events / elapsed_s),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_gib": round(peak_rss_kib / 2**20, 3),
        "input_bytes": sum(path.stat().st_size for path in paths),
        "num_users": info["num_users"],
        "num_items": info["num_items"],
        "num_events": info["num_events"],
        "duplicate_rows": info["duplicate_rows"],
        "longest_history": info["statistics"]["events_per_user"]["max"],
    }


def _peak_rss_kib(pid: int) -> int:
    """Peak resident set of a process so far; 0 once it has ended. The ru_maxrss of a child would start at its parent's."""
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)


def processor() -> str:
    """Number and model of the cores, as results name them."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def _print(results: list[dict[str, Any]]) -> None:
    table = Table(title="mme prepare")
    for column in ("events", "seconds", "events/s", "CPU seconds", "peak GiB"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            f"{result['events']:,}",
            f"{result['elapsed_s']:.1f}",
            f"{result['events_per_s']:,}",
            f"{result['cpu_s']:.1f}",
            f"{result['peak_rss_gib']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
