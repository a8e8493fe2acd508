"""Interactions, configurations and data sets that are changed at random give a right result or one line."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import launcher.__main__
import mme.cli
from mme.config import flat, load_config
from mme.data.dataset import PreparedDataset
from mme.data.description import content_sha256
from mme.data.split import Split
from mme.tune.space import read_space
from tests.fuzz.bench import Bench
from tests.fuzz.mutations import change_bytes, change_file, change_value

PREPARE = ["prepare", "--min-user-events", "3", "--format"]
SPACE = {"model.dropout": {"low": 0.1, "high": 0.5, "step": 0.1}, "model.num_tables": [2, 4]}

pytestmark = pytest.mark.slow


def check_prepared(folder: Path) -> None:
    """The output of a successful command can be read completely."""
    dataset = PreparedDataset.open(folder)
    assert dataset.num_events > 0
    assert int(dataset.user_offsets[-1]) == dataset.num_events
    assert len(list(dataset.events.scan())) > 0


def test_csv(bench: Bench, interactions: pa.Table) -> None:
    table = interactions.to_pydict()
    rows = [",".join(map(str, row)) for row in zip(*table.values(), strict=True)]
    original = "\n".join([",".join(table), *rows, ""]).encode()
    for rng, case in bench.cases():
        (case / "events.csv").write_bytes(change_bytes(rng, original))
        if bench.run(mme.cli.main, *PREPARE, "csv", "--input", case / "events.csv", "--output", case / "out"):
            check_prepared(case / "out")
        else:
            assert [path.name for path in case.iterdir()] == ["events.csv"], case


def test_parquet(bench: Bench, interactions: pa.Table) -> None:
    pq.write_table(interactions, bench.folder / "original.parquet")
    original = (bench.folder / "original.parquet").read_bytes()
    for rng, case in bench.cases():
        (case / "events.parquet").write_bytes(change_bytes(rng, original))
        if bench.run(mme.cli.main, *PREPARE, "parquet", "--input", case / "events.parquet", "--output", case / "out"):
            check_prepared(case / "out")
        else:
            assert [path.name for path in case.iterdir()] == ["events.parquet"], case


def test_configuration(bench: Bench) -> None:
    original = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    for rng, case in bench.cases():
        if rng.randrange(2):
            text = yaml.safe_dump(change_value(rng, original)).encode()
        else:
            text = change_bytes(rng, Path("configs/quickstart.yaml").read_bytes())
        (case / "config.yaml").write_bytes(text)
        if bench.run(launcher.__main__.main, "run", "--config", case / "config.yaml", "--dry-run"):
            config = load_config(case / "config.yaml")
            assert flat(config) == flat(load_config(case / "config.yaml"))
            assert "torch.distributed.run" in bench.out
        for kind in ("slurm", "kubernetes"):
            if bench.run(launcher.__main__.main, kind, "--config", case / "config.yaml", "--dry-run"):
                directives = [line for line in bench.out.splitlines() if line.startswith("#SBATCH")]
                assert kind == "kubernetes" or len(directives) == 9, bench.out


def test_search_space(bench: Bench) -> None:
    config = Path("configs/quickstart.yaml")
    for rng, case in bench.cases():
        text = yaml.safe_dump(change_value(rng, SPACE)).encode()
        (case / "space.yaml").write_bytes(text if rng.randrange(2) else change_bytes(rng, text))
        space = bench.call(read_space, case / "space.yaml", config, [])
        assert space is None or all(entry.extremes() for entry in space), case


def test_data_set(bench: Bench, trained: Path) -> None:
    split = Split("leave_two_out", 0.1)
    sound = PreparedDataset.open(trained / "data")
    counts, targets = sound.training_counts(split), sound.targets_sha256(split, "test")
    for rng, case in bench.cases():
        data = case / "data"
        shutil.copytree(trained / "data", data, ignore=shutil.ignore_patterns(".cache"))
        change_file(rng, rng.choice(sorted(data.iterdir())), bench.mine)
        found = bench.call(facts_of, data, split)
        assert found is None or ((found[0] == counts).all() and found[1] == targets), case
        assert not [path for path in data.rglob("*") if path.name.startswith(".partial")]


def facts_of(data: Path, split: Split) -> tuple[Any, str]:
    dataset = PreparedDataset.open(data)
    assert isinstance(content_sha256(dataset.info), str)
    return dataset.training_counts(split), dataset.targets_sha256(split, "test")


def test_the_cases_differ_and_are_the_same_for_a_seed() -> None:
    def changed(number: int) -> Any:
        return change_bytes(random.Random(number), bytes(range(256)))

    assert changed(1) == changed(1) != changed(2)
