"""How many requests per second does `mme serve` answer, and how fast, beside plain PyTorch?

    OMP_NUM_THREADS=1 python -m benchmarks.serve --json benchmarks/results/serve_cpu.json

For each catalogue and search (exact, by index) the real `mme serve` and `benchmarks.serving.plain` run at the same time, in separate
processes, on exports of one model with random weights. 1, 8 and 64 closed-loop clients ask them over HTTP on the
loopback address, in turns, so that a busy machine slows both by the same factor. A request has one history and k = 10.
Before that, both answer the same requests; the shares of equal items are in the results. The CPU time of a server per request
depends less on what else the machine does.

The exports are kept in --models: the index of 1,000,000 items takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import psutil
import torch
import typer

from benchmarks.roofline import publish, run_header
from benchmarks.serving.clients import ask, measure
from benchmarks.serving.models import Exports, exports_of, manifest, random_histories
from mme.config import load_config

# ruff: noqa: UP045  (typer on Python 3.10)
ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"mme": ["-m", "mme", "serve", "--run"], "plain": ["-m", "benchmarks.serving.plain", "--run"]}
HISTORIES, COMPARED = 512, 64
STARTS_WITHIN_S = 300


def main(
    config: Annotated[Path, typer.Option(help="Configuration of the model.")] = ROOT / "configs/ml-1m.yaml",
    items: Annotated[str, typer.Option(help="Sizes of the catalogue.")] = "10000,1000000",
    clients: Annotated[str, typer.Option(help="Numbers of closed-loop clients.")] = "1,8,64",
    searches: Annotated[str, typer.Option(help="exact, index")] = "exact,index",
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds of a repetition, after an equally long warm-up.")
    ] = 4.0,
    repetitions: Annotated[int, typer.Option(min=2, help="Repetitions per server and number of clients.")] = 5,
    models: Annotated[Path, typer.Option(help="Folder of the exports.")] = ROOT / "benchmarks/raw/serve",
    json_path: Annotated[Optional[Path], typer.Option("--json", help="File for the figures.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Values that replace those of --config.")] = None,
) -> None:
    """Prints a table of requests per second and latencies and, with --json, writes them."""
    settings = load_config(config, ["data.path=unused", *(overrides or [])])
    load_before = os.getloadavg()[0]
    rows = []
    for size in map(int, items.split(",")):
        exports = exports_of(settings, size, models, with_index="index" in searches.split(","))
        histories = random_histories(HISTORIES, size, settings.history_len)
        for search in searches.split(","):
            rows += compare(exports, search, histories, [int(n) for n in clients.split(",")], seconds, repetitions)
    header = run_header(
        torch.device("cpu"),
        torch.float32,
        versions={name: version(name) for name in ("fastapi", "uvicorn", "pydantic", "pyarrow", "faiss-cpu")},
        cores=os.cpu_count(),
        load_average_before=load_before,
        config=config.name,
        embedding_dim=settings.model.embedding_dim,
        max_seq_len=settings.data.max_seq_len,
        mean_events=statistics.mean(len(history["item_ids"]) for history in histories),
        k=10,
        seconds=seconds,
        repetitions=repetitions,
    )
    columns = (
        "items",
        "search",
        "clients",
        "server",
        "requests/s",
        "spread",
        "ratio",
        "p50 ms",
        "p99 ms",
        "CPU ms",
        "CPU ratio",
    )
    publish("Serving", header, columns, map(_cells, rows), rows, json_path)


def compare(
    exports: Exports, search: str, histories: list[dict[str, Any]], clients: list[int], seconds: float, repetitions: int
) -> list[dict[str, Any]]:
    """The figures of both servers for one catalogue and search."""
    bodies = [json.dumps({"histories": [history], "k": 10}).encode() for history in histories]
    rows = []
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server(name, exports, search)) for name in COMMANDS}
        share = shared_items(*[ask(each.port, bodies[:COMPARED]) for each in servers.values()])
        for number in clients:
            found: dict[str, list[Repetition]] = {name: [] for name in servers}
            for repetition in range(-1, repetitions):  # the first one warms up
                for name, each in servers.items():
                    cpu_before = each.cpu_seconds()
                    times, requests = measure(each.port, bodies, number, seconds)
                    if repetition >= 0:
                        found[name].append(Repetition(times, requests, each.cpu_seconds() - cpu_before))
            both = {name: figures(of_server, seconds) for name, of_server in found.items()}
            for name, of_server in both.items():
                rows.append(
                    {
                        "items": exports.items,
                        "search": search,
                        "clients": number,
                        "server": name,
                        **of_server,
                        "ratio": of_server["requests_per_s"] / both["plain"]["requests_per_s"],
                        "cpu_ratio": both["plain"]["cpu_ms"] / of_server["cpu_ms"],
                        "items_shared_with_plain": share,
                        **(_index_figures(exports) if search == "index" else {}),
                    }
                )
    return rows


@dataclass(frozen=True)
class Repetition:
    """The milliseconds of each request in time, the number of all requests, and the server's CPU time for these in seconds."""

    times_ms: list[float]
    requests: int
    cpu_seconds: float


def figures(repetitions: list[Repetition], seconds: float) -> dict[str, Any]:
    """The figures of repetitions of ``seconds``: median and spread (half the interquartile range) of requests per second,
    percentiles of all requests together, and CPU milliseconds per request."""
    low, median, high = statistics.quantiles([len(each.times_ms) / seconds for each in repetitions], n=4)
    times = [time_ms for each in repetitions for time_ms in each.times_ms] or [math.nan]
    return {
        "requests_per_s": median,
        "spread": (high - low) / 2,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "cpu_ms": 1e3 * sum(each.cpu_seconds for each in repetitions) / sum(each.requests for each in repetitions),
        "requests": len(times),
    }


def shared_items(ours: list[Any], plain: list[Any]) -> float:
    """The share of the items in the lists of one server that are in those of the other."""
    pairs = [
        (set(a["item_ids"]), set(b["item_ids"]))
        for one, other in zip(ours, plain, strict=True)
        for a, b in zip(one["results"], other["results"], strict=True)
    ]
    return sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def server(name: str, exports: Exports, search: str) -> Iterator[Server]:
    """Runs a server and yields it when it answers."""
    command = [sys.executable, *COMMANDS[name], str(exports.weights), "--port", "0"]
    if search == "index":
        command += ["--index", str(exports.index)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"{' '.join(command)}: ended with status {process.wait()}")
        _wait_for(int(found[1]))
        yield Server(int(found[1]), psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    """Returns when the server accepts connections; its address is bound a moment before."""
    end = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _index_figures(exports: Exports) -> dict[str, Any]:
    about = json.loads(manifest(exports.index).read_text())
    return {
        "index": about["kind"],
        "recall": next(value for name, value in about.items() if name.startswith("recall@")),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['items']:,}",
        row["search"],
        str(row["clients"]),
        row["server"],
        f"{row['requests_per_s']:.1f}",
        f"{row['spread']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['p50_ms']:.2f}",
        f"{row['p99_ms']:.2f}",
        f"{row['cpu_ms']:.2f}",
        f"{row['cpu_ratio']:.2f}",
    )


if __name__ == "__main__":
    typer.run(main)
