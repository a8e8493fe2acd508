"""Do the readers keep up? Tokens per second of one reader on one core, share of a step spent waiting, memory by events.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --millions 1 --millions 10 --millions 100 --json benchmarks/results/data_loading_cpu.json

Training sets of histories of log-normal length (median 60 events, mean about 100, one of 200,000) are written to disk and read by
the loader of training: positions, distribution over the ranks, reading, assembling. Each measurement runs in a separate process.
The flat file is read from the kernel's page cache (warm) and after it has been dropped from there (cold).
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import pyarrow as pa
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.json_file import write_json
from benchmarks.prepare import processor
from launcher.shape import Shape
from launcher.step_time import time_parts, total_s
from mme.config import DataConfig, load_config
from mme.data.balance import deal, sequence_cost
from mme.data.dataset import PreparedDataset
from mme.data.loaders import TrainLoader, Worker
from mme.data.parts import IntArray
from mme.data.split import Split
from mme.devices import DEVICES
from mme.prepare.writer import DatasetWriter

USERS_AT_ONCE = 20_000
LONGEST = 200_000
BATCH_SIZE = 128  # sequences per rank
SECONDS = 4.0  # per measurement
SETTINGS = [(1, 200), (8, 200), (64, 200), (512, 200), (8, 1000)]  # ranks, max_seq_len
H100_CONFIG = Path("configs/ml-20m.yaml")
H100_ITEMS = 100_000


def main(
    millions: Annotated[Optional[list[float]], typer.Option(help="Millions of events; can be repeated.")] = None,  # noqa: UP045
    folder: Annotated[Optional[Path], typer.Option(help="Work folder; takes about 20 bytes per event.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--json", help="File to write the figures to.")] = None,  # noqa: UP045
) -> None:
    """Measures speed, waiting and memory, and prints them."""
    results: dict[str, Any] = {"processor": processor(), "torch": torch.__version__, "batch_size": BATCH_SIZE}
    results["memory"] = []
    sizes = sorted(round(size * 1e6) for size in millions or [1, 10])
    for num_events in sizes:
        work = Path(tempfile.mkdtemp(dir=folder))
        try:
            write_set(work / "set", num_events)
            results["memory"].append(in_process(memory_of, work / "set"))
            if num_events == sizes[-1]:
                results["reader"] = [in_process(reader_rate, work / "set", *setting) for setting in SETTINGS]
                results["straggler"] = in_process(stragglers, work / "set")
        finally:
            shutil.rmtree(work)
    results["load_average"] = round(os.getloadavg()[0], 1)  # includes other programs
    results["training"] = waiting_share()
    results["h100"] = h100s_fed(results["reader"])
    _print(results)
    if output:
        write_json(output, results)


def write_set(folder: Path, num_events: int) -> None:
    """Writes a training set of about ``num_events`` events, with items of skewed popularity."""
    rng = np.random.default_rng(0)
    num_items = max(num_events // 1000, 1000)
    counts = np.zeros(num_items, np.int64)
    with DatasetWriter(folder) as writer:
        written = user = 0
        while written < num_events:
            lengths = np.clip(rng.lognormal(np.log(60), 1.0, USERS_AT_ONCE), 3, 5000).astype(np.int64)
            lengths = lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), num_events - written))]
            if not written:
                lengths[0] = LONGEST
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            items = (num_items * rng.random(offsets[-1]) ** 3).astype(np.int64)
            times = 1_600_000_000 + np.arange(offsets[-1])
            writer.add(pa.array(np.arange(user, user + lengths.size)), offsets, items, times)
            counts += np.bincount(items, minlength=num_items)
            written, user = written + int(offsets[-1]), user + lengths.size
        writer.finish({"name": "skewed", "sort_rule": "generated"}, pa.array(np.arange(num_items)), counts)


def in_process(function: Any, *arguments: Any) -> Any:
    """Calls ``function`` in a new process and returns its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def loader_of(dataset: PreparedDataset, world_size: int, max_seq_len: int) -> TrainLoader:
    data = DataConfig(max_seq_len=max_seq_len, batch_size=BATCH_SIZE)
    return TrainLoader(dataset, data, Worker(0, world_size, torch.device("cpu")))


def reader_rate(folder: Path, world_size: int, max_seq_len: int) -> dict[str, Any]:
    """Tokens per second that one reader on one core assembles for one of ``world_size`` ranks."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    dataset = PreparedDataset.open(folder)
    loader = loader_of(dataset, world_size, max_seq_len)
    figures: dict[str, Any] = {"world_size": world_size, "max_seq_len": max_seq_len}
    places = list(itertools.pairwise(loader.bounds(0).tolist()))
    loader.batch(0, *places[0])  # the epoch's order is drawn
    for name, cold in (("warm", False), ("cold", True)):
        rates: list[float] = []
        if cold:
            with dataset.events.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.process_time()
        end = time.perf_counter() + SECONDS
        index = all_tokens = 0
        while time.perf_counter() < end:
            started, tokens = time.perf_counter(), 0
            for _ in range(max(1, 64 // world_size)):
                tokens += loader.batch(0, *places[index % len(places)]).num_tokens
                index += 1
            rates.append(tokens / (time.perf_counter() - started))
            all_tokens += tokens
        low, median, high = statistics.quantiles(rates, n=4)
        figures[name] = {
            "tokens_per_s": round(median),
            "quartiles": [round(low), round(high)],
            "tokens_per_cpu_s": round(all_tokens / (time.process_time() - begun)),
        }
    return figures


@contextmanager
def peak_anonymous_mib() -> Iterator[list[float]]:
    """Yields a list whose only entry becomes the peak growth of the process's anonymous memory in the context, in MiB."""

    def now() -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

    begin, peak, stop = now(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], now() - begin)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak[0] = round(max(peak[0], now() - begin), 1)


def memory_of(folder: Path) -> dict[str, Any]:
    """Memory growth of a rank and seconds of each of these: opening the set for the first and the second time, reading the batches
    of one of 8 ranks, evaluating (training counts and hash of the targets), and finding the cut-off of `global_time`."""
    info = json.loads((folder / "dataset.json").read_text())
    figures: dict[str, Any] = {"events": info["num_events"], "users": info["num_users"]}

    def measured(name: str, work: Any) -> Any:
        started = time.perf_counter()
        with peak_anonymous_mib() as peak:
            result = work()
        figures[name] = {"seconds": round(time.perf_counter() - started, 2), "anonymous_mib": peak[0]}
        return result

    measured("first_open", lambda: PreparedDataset.open(folder))
    dataset = measured("second_open", lambda: PreparedDataset.open(folder))
    figures["flat_file_bytes"] = dataset.events.path.stat().st_size

    def train() -> None:
        loader = loader_of(dataset, 8, 200)
        for _ in zip(range(200), loader.stream(), strict=False):
            pass

    def evaluate() -> None:
        dataset.training_counts(Split("leave_two_out"))
        dataset.targets_sha256(Split("leave_two_out"), "test")

    measured("200_batches_of_one_of_8_ranks", train)
    measured("counts_and_hash", evaluate)
    measured("global_time_cut", lambda: dataset.train_ends(Split("global_time")))
    return figures


def stragglers(folder: Path) -> list[dict[str, Any]]:
    """The average share of time that ranks wait for the slowest one, over 40 batches, dealt round robin and by cost."""
    dataset = PreparedDataset.open(folder)
    results = []
    for world_size, max_seq_len in ((8, 200), (8, 1000), (64, 1000)):
        lengths = loader_of(dataset, 1, max_seq_len).windows.take(np.arange(dataset.num_users // 2)).lengths
        lengths = np.random.default_rng(0).choice(lengths, (40, world_size * BATCH_SIZE))
        shares = []
        for costs in sequence_cost(lengths, 528):
            in_turn = np.arange(costs.size) % world_size
            shares.append([straggler_share(costs, ranks, world_size) for ranks in (in_turn, deal(costs, world_size))])
        before, after = np.mean(shares, axis=0).tolist()
        results.append({"world_size": world_size, "max_seq_len": max_seq_len, "before": before, "after": after})
    return results


def waiting_share() -> dict[str, Any]:
    """Measures whole training steps of the quick start on two CPU processes, with `benchmarks.train_throughput`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.train_throughput", "--json", str(result)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures = json.loads(result.read_text())
    return {key: figures[key] for key in ("setting", "processes", "tokens_per_s", "waiting_share")}


def h100s_fed(rates: list[dict[str, Any]]) -> dict[str, Any]:
    """How many H100s of a node of eight one reader with its own core can supply, at the rate that `launcher plan` predicts."""
    config = load_config(H100_CONFIG, [f"data.batch_size={BATCH_SIZE}"])
    shape = Shape(config, 8, 8, H100_ITEMS)
    wanted = shape.tokens / total_s(time_parts(shape, DEVICES["h100-80g"]))
    (given,) = (r["warm"]["tokens_per_cpu_s"] for r in rates if (r["world_size"], r["max_seq_len"]) == (8, 200))
    return {
        "assumption": f"launcher plan of {H100_CONFIG}, one node of 8 × h100-80g, {H100_ITEMS:,} items",
        "tokens_per_s_of_one_h100": round(wanted),
        "h100s_fed_by_one_reader": round(given / wanted, 2),
    }


def _print(results: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="one reader on one core, million tokens/s")
    for column in ("ranks", "max_seq_len", "warm", "quartiles", "of CPU time", "cold"):
        table.add_column(column, justify="right")
    for row in results["reader"]:
        warm = row["warm"]
        quartiles = " – ".join(f"{value / 1e6:.2f}" for value in warm["quartiles"])
        rates = (warm["tokens_per_s"], warm["tokens_per_cpu_s"], row["cold"]["tokens_per_s"])
        first, *rest = (f"{rate / 1e6:.2f}" for rate in rates)
        table.add_row(str(row["world_size"]), str(row["max_seq_len"]), first, quartiles, *rest)
    console.print(table)
    table = Table(title="growth of a rank's anonymous memory, MiB (seconds)")
    steps = [name for name, value in results["memory"][0].items() if isinstance(value, dict)]
    for column in ("events", "users", *(name.replace("_", " ") for name in steps)):
        table.add_column(column, justify="right")
    for row in results["memory"]:
        cells = (f"{row[name]['anonymous_mib']:,.0f} ({row[name]['seconds']:.2f})" for name in steps)
        table.add_row(f"{row['events']:,}", f"{row['users']:,}", *cells)
    console.print(table)
    for name in ("straggler", "training", "h100"):
        console.print(f"{name}: {results[name]}", highlight=False)


def straggler_share(costs: IntArray, ranks: IntArray, world_size: int) -> float:
    """The average share of time that ranks wait for the slowest one: (max − mean) / max of their loads."""
    load = np.bincount(ranks, weights=costs, minlength=world_size)
    return float(1 - load.mean() / load.max())


if __name__ == "__main__":
    typer.run(main)
