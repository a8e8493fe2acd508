"""The files that cases change: interactions, a data set, and a run with two checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mme.cli
from tests.fuzz.bench import Bench

SMALL = [
    "data.max_seq_len=16",
    "model.embedding_dim=8",
    "model.num_blocks=1",
    "model.moe.num_experts=2",
    "train.steps=4",
    "model.moe.placement=[0]",
]
OFTEN = ["train.checkpoint_every=2", "train.eval_every=2", "data.batch_size=16", "train.log_every=1"]


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, capfd, request.node.name)


@pytest.fixture(scope="session")
def interactions() -> pa.Table:
    rng = np.random.default_rng(7)
    users, items = rng.integers(0, 12, 240), rng.integers(0, 25, 240)
    return pa.table({"user_id": users, "item_id": items, "timestamp": 1_600_000_000 + rng.integers(0, 10**6, 240)})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, interactions: pa.Table) -> Path:
    """A data set and a run with two checkpoints, `data` and `run`."""
    folder = tmp_path_factory.mktemp("trained")
    pq.write_table(interactions, folder / "events.parquet")
    prepare = ["prepare", "--input", folder / "events.parquet", "--output", folder / "data"]
    prepare += ["--format", "parquet", "--min-user-events", "3"]
    assert mme.cli.main([*map(str, prepare)]) == 0
    values = [f"data.path={folder / 'data'}", f"output_dir={folder / 'run'}", *SMALL, *OFTEN]
    train = [sys.executable, "-m", "mme", "train", "--config", "configs/quickstart.yaml", *values]
    done = subprocess.run(train, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder
