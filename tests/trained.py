"""A small run, trained once for all tests that need one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Trained:
    """The folders of a run and of its data set."""

    run: Path
    data: Path

    def users(self) -> pa.Table:
        """`user_id`, `item_ids` (raw) and `timestamps` of every user."""
        table = pa.concat_tables(pq.read_table(path) for path in sorted(self.data.glob("part-*.parquet")))
        raw = pq.read_table(self.data / "items.parquet").sort_by("item_index")["item_id"].combine_chunks()
        lists = table["item_ids"].combine_chunks()
        items = pa.ListArray.from_arrays(lists.offsets, raw.take(lists.flatten()))
        return pa.table({"user_id": table["user_id"], "item_ids": items, "timestamps": table["timestamps"]})


def train_small(folder: Path) -> Trained:
    """120 users, 60 items, one epoch of two tables and four experts."""
    prepare = ["prepare", "--synthetic", "quickstart", "--users", "120", "--items", "60", "--output", folder / "data"]
    mme(*prepare)
    small = ["model.embedding_dim=16", "model.num_blocks=1", "model.num_heads=1", "model.moe.num_experts=4"]
    small += ["model.moe.placement=[0]", "train.epochs=1", "data.max_seq_len=32"]
    config = REPOSITORY / "configs" / "quickstart.yaml"
    mme("train", "--config", config, f"data.path={folder / 'data'}", f"output_dir={folder / 'run'}", *small)
    return Trained(folder / "run", folder / "data")


def mme(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mme", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check, timeout=500)
