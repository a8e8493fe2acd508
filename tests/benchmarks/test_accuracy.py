"""The accuracy table: its arithmetic, and training of all its models by the real command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.accuracy import MODELS, SETTINGS, ndcg_at_10, overrides_of, paired_p, prepare, set_for
from benchmarks.tuning import space_of
from mme.config import load_config
from mme.errors import UserError
from mme.prepare.synthetic import prepare_synthetic
from mme.tune.space import read_space

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["data.max_seq_len=16", "data.batch_size=32", "train.log_every=1", "train.keep_checkpoints=1"]


def test_ndcg_of_a_user_depends_on_the_rank() -> None:
    assert ndcg_at_10(torch.tensor([1, 3, 10, 11])).tolist() == pytest.approx([1, 0.5, 0.289065, 0])


def test_p_covers_all_choices_of_signs() -> None:
    # Of the 2⁶ choices of signs, only all plus and all minus reach the sum: p = 2 / 64.
    assert paired_p(torch.tensor([1.0, 2, 3, 4, 5, 6, 0, 0])) == pytest.approx(2 / 64)
    assert paired_p(torch.tensor([0.0, 3, 0])) == 1
    assert paired_p(torch.tensor([1.0, -1, 2, -2])) == 1
    assert paired_p(torch.zeros(5)) == 1
    assert paired_p(torch.ones(50)) == pytest.approx(1 / 10_001)


@pytest.mark.parametrize("tables", [2, 4])
@pytest.mark.parametrize("data", SETTINGS)
def test_models_have_tables_of_the_same_number_of_parameters(data: str, tables: int) -> None:
    path = REPOSITORY / "configs" / f"{data}.yaml"
    configs = {name: load_config(path, ["data.path=unused", *overrides_of(name, data, tables)]) for name in MODELS}
    assert {config.model.num_tables * config.model.view_dim for config in configs.values()} == {
        tables * (32 if data == "ml-latest-small" else 64)
    }
    assert {name: (c.model.num_tables, c.model.moe.num_experts) for name, c in configs.items()} == {
        "sasrec": (1, 0),
        "esasrec": (1, 0),
        "hstu": (1, 0),
        "fuxi-alpha": (1, 0),
        "multi-embedding": (tables, 0),
        "moe": (1, 8),
        "fuxi-mme": (tables, 8),
    }


@pytest.mark.parametrize("name", MODELS)
def test_each_model_searches_valid_values(name: str, tmp_path: Path) -> None:
    overrides = ["data.path=unused", *overrides_of(name, "amazon-beauty", 2)]
    file = tmp_path / "space.yaml"
    file.write_text(space_of(name))
    space = read_space(file, REPOSITORY / "configs" / "amazon-beauty.yaml", overrides)
    assert {"model.embedding_dim", "train.lr", "loss.num_negatives"} < {entry.key for entry in space}
    assert any(entry.key == "model.moe.top_k" for entry in space) == (name in ("moe", "fuxi-mme"))


def test_published_ratings_and_parquet_give_the_same_set(tmp_path: Path) -> None:
    events = [(user, item, 1000 * user + item) for user in range(1, 6) for item in range(1, 5)]
    csv, parquet = tmp_path / "ratings.csv", tmp_path / "ratings.parquet"
    lines = [f"{user},{item},4.5,{seconds}" for user, item, seconds in events]
    csv.write_text("\n".join(["userId,movieId,rating,timestamp", *lines]) + "\n")
    columns = zip(["user_id", "item_id", "timestamp"], zip(*events, strict=True), strict=True)
    pq.write_table(pa.table(dict(columns)), parquet)
    sets = [prepare("ml-latest-small", file, tmp_path / file.suffix) for file in (csv, parquet)]
    first, second = (pq.read_table(folder / "part-00000.parquet") for folder in sets)
    assert first.num_rows == 5
    assert first.equals(second)


def test_a_setting_applies_to_all_models_or_to_one() -> None:
    settings = ["train.lr=0.1", "hstu:model.dropout=0.5", "data.path=a:b"]
    assert set_for("hstu", settings) == ["train.lr=0.1", "model.dropout=0.5", "data.path=a:b"]
    assert set_for("sasrec", settings) == ["train.lr=0.1", "data.path=a:b"]
    with pytest.raises(UserError, match="unknown model hst: expected one of sasrec, esasrec, hstu"):
        set_for("hstu", ["hst:train.lr=0.1"])


def run_table(work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-m", "benchmarks.accuracy", "--work", str(work), "--epochs", "1", *settings, *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)


@pytest.mark.slow
def test_a_model_is_tuned_before_its_runs(tmp_path: Path) -> None:
    prepare_synthetic("quickstart", tmp_path / "data" / "quickstart", users=100, items=120, seed=3)
    done = run_table(tmp_path, "--seed", "1", "--model", "hstu", "--trials", "2", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "quickstart.json").read_text())["models"]["hstu"]
    assert [trial["state"] for trial in row["trials"]] == ["complete"] * 2
    best = max(row["trials"], key=lambda trial: trial["ndcg@10"])
    assert row["tuned"] == [f"{key}={json.dumps(value)}" for key, value in best["values"].items()]
    trained = load_config(tmp_path / "runs" / "quickstart" / "hstu" / "seed-1" / "config.yaml")
    assert trained.train.lr == best["values"]["train.lr"]
    assert trained.model.embedding_dim == best["values"]["model.embedding_dim"]


@pytest.mark.slow
def test_every_model_trains_and_a_stopped_table_resumes(tmp_path: Path) -> None:
    prepare_synthetic("quickstart", tmp_path / "data" / "quickstart", users=100, items=120, seed=3)
    done = run_table(tmp_path, "--seed", "1")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "quickstart.json").read_text())
    assert list(table["models"]) == ["popularity", *MODELS]
    for name in MODELS:
        assert 0 < table["models"][name]["p"] <= 1 if name != "fuxi-alpha" else "p" not in table["models"][name]
        assert table["models"][name]["parameters"]["item tables"] == 128 * 120

    # Only the run that lost its end is trained again, from its checkpoint, and the table does not change.
    lost = tmp_path / "runs" / "quickstart" / "hstu" / "seed-1"
    (lost / "test_ranks.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "quickstart" / "moe" / "seed-1" / "checkpoints")  # not needed any more
    page = (tmp_path / "quickstart.md").read_text()
    again = run_table(tmp_path, "--seed", "1")
    assert again.returncode == 0, again.stderr
    trained = [line for line in again.stderr.splitlines() if line.startswith("quickstart ")]
    assert len(trained) == 1
    assert trained[0].startswith("quickstart hstu seed 1: ")
    assert (tmp_path / "quickstart.md").read_text() == page
    other = run_table(tmp_path, "--seed", "1", "--set", "train.lr=0.5", "--model", "hstu")
    assert other.returncode == 2
    assert "has a run with another configuration" in other.stderr
