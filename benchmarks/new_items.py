"""Which start of new items is better on the next day's events: the mean of the known items, or random?

    OMP_NUM_THREADS=1 python -m benchmarks.new_items --input events.parquet --json out.json

The events are cut by time into a base, a day and the next day. A run is trained on the base; the day is added, and the run
resumes for one epoch with each `model.new_items`. Then the next day is added, and the model ranks the last event of each user who
is active on it, over the items that the model knows. `new` are the targets among the items that the day had brought.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import typer

import mme
from benchmarks.roofline import JsonPath, publish, run_header
from mme.data.dataset import PreparedDataset
from mme.evaluation.evaluate import evaluate_run
from mme.evaluation.user_ranks import UNRANKED, read_user_ranks
from mme.prepare.pipeline import add_events, prepare

MODEL = {
    "data": {"protocol": "leave_one_out", "max_seq_len": 50, "batch_size": 128},
    "model": {"num_tables": 1, "embedding_dim": 64, "num_blocks": 1, "num_heads": 1, "dropout": 0.3},
    "loss": {"negatives": "shared", "num_negatives": 256},
    "train": {"lr": 0.002, "table_lr": 0.01, "eval_every": 1_000_000},
}


def main(
    input: Annotated[Path, typer.Option(help="Parquet with user_id, item_id and timestamp.")],
    base: Annotated[float, typer.Option(help="Share of the events in the base.")] = 0.8,
    day: Annotated[float, typer.Option(help="Share of the events in each of the two days.")] = 0.05,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training on the base.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 2,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of NDCG@10 and HR@10 and, with --json, writes it."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = cut(pq.read_table(input), [base, base + day, base + 2 * day], Path(folder))
        prepare([parts[0]], "parquet", Path(folder) / "base", min_user_events=1, min_item_events=1)
        for seed in range(seeds):
            before = Path(folder) / f"before_{seed}"
            train(Path(folder) / "base", before, seed, epochs, "mean")
            for start in ("mean", "random"):
                rows.append(next_day(Path(folder), before, parts[1:], seed, epochs + 1, start))
    columns = ("new_items", "seed", "users", "ndcg@10", "hr@10", "new", "ndcg@10 new", "hr@10 new")
    cells = [tuple(f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns) for row in rows]
    header = run_header(torch.device("cpu"), torch.float32, input=input.name, epochs=epochs, base=base, day=day)
    publish("The next day's events", header, columns, cells, rows, json_path)


def cut(events: pa.Table, shares: list[float], folder: Path) -> list[Path]:
    """Files of the events by time, each up to its share."""
    times = events["timestamp"]
    bounds = [-np.inf, *np.quantile(times.to_numpy(), shares)]
    paths = []
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"part_{number}.parquet"
        inside = pc.and_(pc.greater_equal(times, low), pc.less(times, high))
        pq.write_table(events.filter(inside).select(["user_id", "item_id", "timestamp"]), path)
        paths.append(path)
    return paths


def train(data: Path, run: Path, seed: int, epochs: int, start: str) -> None:
    """Trains, or resumes, up to ``epochs`` epochs."""
    overrides = [f"data.path={data}", f"output_dir={run}", f"train.seed={seed}", f"train.epochs={epochs}"]
    mme.train(MODEL, [*overrides, f"model.new_items={start}"])


def next_day(folder: Path, before: Path, days: list[Path], seed: int, epochs: int, start: str) -> dict[str, Any]:
    """Adds a day, resumes, adds the next day and ranks its users' last events."""
    data, run = folder / f"data_{start}_{seed}", folder / f"run_{start}_{seed}"
    shutil.copytree(folder / "base", data)
    shutil.copytree(before, run)
    num_known = PreparedDataset.open(data).num_items
    add_events([days[0]], data)
    train(data, run, seed, epochs, start)
    add_events([days[1]], data)
    evaluate_run(run, None, save_ranks=True)
    dataset, found = PreparedDataset.open(data), read_user_ranks(run)
    ends = dataset.user_offsets[found.user_row + 1] - 1
    last = dataset.read(ends, np.ones_like(ends))
    is_active = last["timestamp"] >= pc.min(pq.read_table(days[1])["timestamp"]).as_py()
    is_new = is_active & (last["item"] >= num_known)
    row: dict[str, Any] = {"new_items": start, "seed": seed, "users": int(is_active.sum()), "new": int(is_new.sum())}
    for chosen, suffix in ((is_active, ""), (is_new, " new")):
        ranks = found.rank[chosen]
        hits = (ranks <= 10) & (ranks != UNRANKED)
        row[f"hr@10{suffix}"] = float(hits.mean())
        row[f"ndcg@10{suffix}"] = float(np.where(hits, 1 / np.log2(1.0 + np.where(hits, ranks, 1)), 0).mean())
    return row


if __name__ == "__main__":
    typer.run(main)
