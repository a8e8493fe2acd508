"""Event and user features with the real commands: prepare, train on two processes, resume, evaluate, recommend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_train import losses, train

NUM_ITEMS = 40
STEP_OF = {"view": 1, "buy": 7}  # step to the next item, which is unpredictable without the action
FEATURES = ["model.event_features=[action]", "model.user_features=[segment,user_id]"]
QUICK = ["loss.kind=full_softmax", "model.dropout=0", "train.lr=0.01", "train.epochs=20", "train.eval_every=50"]


def mme(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mme", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    generator, lines = np.random.default_rng(0), ["user,item,time,action,segment"]
    for user in range(160):
        item = int(generator.integers(NUM_ITEMS))
        for time in range(16):
            action = ("view", "buy")[int(generator.integers(2))]
            lines.append(f"u{user},{item},{1000 * user + time},{action},{'ab'[user % 2]}")
            item = (item + STEP_OF[action]) % NUM_ITEMS
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    done = mme("prepare", folder / "log.csv", "--format", "csv", "--feature-columns", "action, segment", "--output", folder / "set")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "values of action" in done.stdout
    return folder / "set"


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    run = data.parent / "run"
    done = train(data, run, *QUICK, *FEATURES, processes=2)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_actions_are_learned_and_a_stopped_run_resumes(data: Path, run: Path, tmp_path: Path) -> None:
    done = train(data, tmp_path / "without", *QUICK, processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(run)[-1][1] < losses(tmp_path / "without")[-1][1] - 0.3  # knowing the action is worth ln 2
    stopped = tmp_path / "stopped"
    for overrides in (["train.steps=7"], []):
        done = train(data, stopped, *QUICK, *FEATURES, *overrides, processes=2)
        assert done.returncode == 0, done.stderr
    assert losses(stopped) == losses(run)


@pytest.mark.slow
def test_evaluation_and_recommendations_use_features(data: Path, run: Path, tmp_path: Path) -> None:
    done = mme("evaluate", "--run", run)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["mrr"] > 0.6  # 0.5 if the two items cannot be distinguished
    actions = [action for _ in range(NUM_ITEMS) for action in STEP_OF]
    histories = {
        "user_id": [f"u{number}" for number in range(len(actions))],
        "item_ids": [[number // 2] for number in range(len(actions))],
        "timestamps": [[1000 * number] for number in range(len(actions))],
        "action": [[action] for action in actions],
        "segment": ["a", "never met"] * NUM_ITEMS,
    }
    pq.write_table(pa.table(histories), tmp_path / "histories.parquet")
    words = ["recommend", "--run", run, "--top-k", "1", "--output", tmp_path / "top.parquet", "--users"]
    done = mme(*words, tmp_path / "histories.parquet")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(tmp_path / "top.parquet")["item_ids"].to_pylist()
    expected = [[(number // 2 + STEP_OF[action]) % NUM_ITEMS] for number, action in enumerate(actions)]
    assert np.mean([a == b for a, b in zip(found, expected, strict=True)]) > 0.8

    del histories["action"]
    pq.write_table(pa.table(histories), tmp_path / "without.parquet")
    pq.write_table(pa.table({**histories, "action": actions}), tmp_path / "flat.parquet")
    pq.write_table(pa.table({**histories, "action": [[a, a] for a in actions]}), tmp_path / "long.parquet")
    for name, message in {
        "without": "no column 'action', which the model reads (model.event_features)",
        "flat": "column 'action' contains string, expected a list with a value for each event",
        "long": "row 0: column 'action' has 2 values, expected 1, as many as item_ids",
    }.items():
        done = mme(*words, tmp_path / f"{name}.parquet")
        assert done.returncode == 2
        assert done.stderr == f"error: {tmp_path / name}.parquet: {message}\n"


def test_an_unknown_feature_is_named(data: Path, tmp_path: Path) -> None:
    done = train(data, tmp_path / "run", "model.event_features=[acton]")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{data}: no column 'acton'" in done.stderr
    assert "its columns are action, segment" in done.stderr
