"""Tokens a second that one reader assembles on one core: python -m benchmarks.data_loading --json F."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import pyarrow as pa
import torch
import typer

from mme.data.dataset import PreparedDataset
from mme.data.sequences import TrainLoader
from mme.data.writer import DatasetWriter

NUM_ITEMS, NUM_USERS, REPEATS = 100_000, 50_000, 5


def skewed_dataset(folder: Path) -> PreparedDataset:
    """Histories of log-normal length, median 100 events, at most 2,000."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(100), 1.0, NUM_USERS), 3, 2000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(NUM_ITEMS, size=offsets[-1])
    with DatasetWriter(folder) as writer:
        writer.add(pa.array(np.arange(NUM_USERS)), offsets, items, np.arange(items.size))
        counts = np.bincount(items, minlength=NUM_ITEMS)
        writer.finish({"name": "skewed", "sort_rule": "generated"}, pa.array(np.arange(NUM_ITEMS)), counts)
    return PreparedDataset.open(folder)


def measure(dataset: PreparedDataset, max_seq_len: int, world_size: int) -> dict[str, Any]:
    """Median tokens a second of rank 0 over epochs, each batch assembled in the calling thread."""
    loader = TrainLoader(dataset, "leave_two_out", max_seq_len=max_seq_len, batch_size=128, world_size=world_size)
    rates = []
    for epoch in range(REPEATS):
        started = time.perf_counter()
        tokens = sum(loader.batch(epoch, index).num_tokens for index in range(loader.num_batches(epoch)))
        rates.append(tokens / (time.perf_counter() - started))
    return {"max_seq_len": max_seq_len, "world_size": world_size, "tokens_per_s": round(statistics.median(rates))}


def main(json_path: Annotated[Optional[Path], typer.Option("--json")] = None) -> None:  # noqa: UP045
    """Prints the figures and, with --json, writes them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = skewed_dataset(Path(folder) / "skewed")
        results = [measure(dataset, max_seq_len, world) for max_seq_len in (200, 1000) for world in (1, 8)]
    record = {
        "what": "one reader, one core, batches of 128 sequences a rank from the flat file",
        "machine": {"processor": platform.machine(), "torch": torch.__version__},
        "repeats": REPEATS,
        "results": results,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
