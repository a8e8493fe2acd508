"""Data sets that grow day by day, and runs on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from mme.config import load_config
from mme.data.dataset import PreparedDataset
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import read_index
from mme.distributed.state import optimizer_pieces, weight_pieces
from mme.distributed.world import World
from mme.errors import UserError
from mme.prepare.pipeline import prepare
from mme.run.preemption import Preemption
from mme.training import Training
from tests.distributed.test_step import whole
from tests.trained import REPOSITORY

USERS = 60
JOB = [
    "data.max_seq_len=16",
    "data.batch_size=8",
    "data.protocol=leave_two_out",
    "model.num_tables=2",
    "model.embedding_dim=16",
    "model.moe.num_experts=4",
    "model.event_features=[action]",
    "train.table_optimizer=adam",
    "train.log_every=1",
    "train.epochs=1",
]


def events_of(day: int, text_ids: bool = False, first_item: int = 1) -> list[tuple[Any, ...]]:
    """A day's events of the same users, each four items in turn, with five more items than the day before and a new action."""
    random = np.random.default_rng(day)
    rows = []
    for user in range(USERS):
        first = int(random.integers(20 + 5 * day))
        for number in range(4):
            item = (first + number) % (20 + 5 * day)
            action = "view" if number else f"action {day}"
            rows.append(
                (user, f"item {item}" if text_ids else 7 * (item + first_item), day * 86_400 + 60 * number, action)
            )
    return rows


def write(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp", "action"), *rows])
    return path


def first_day(folder: Path, day: int = 0, **options: Any) -> Path:
    name = folder / f"set_{day}_{len(options)}"
    rows = events_of(day, **options)
    prepare([write(folder / f"{name.name}.csv", rows)], "csv", name, feature_columns=["action"], min_user_events=1)
    return name


def train(world: World, data: str, run: str, *overrides: str) -> dict[str, Any]:
    """Trains; returns this rank's parts of the state when training began and at the end, and the notes."""
    config = load_config(
        REPOSITORY / "configs" / "quickstart.yaml", [*JOB, f"data.path={data}", f"output_dir={run}", *overrides]
    )
    seen: dict[str, Any] = {"steps": []}
    with Preemption() as preemption:
        training = Training(config, PreparedDataset.open(Path(data)), world, preemption)

        def parts() -> list[Any]:
            pieces = [*weight_pieces(training.recommender), *optimizer_pieces(training.recommender)]
            return [(piece.name, piece.shape, piece.offsets, piece.read().clone()) for piece in pieces]

        backward = training.step.backward

        def watched(step: int, *rest: Any) -> Any:
            if not seen["steps"]:
                seen["begin"] = parts()
            seen["steps"].append(step)
            return backward(step, *rest)

        training.step.backward = watched  # type: ignore[method-assign]
        training.run()
        seen["end"] = parts() if not seen["steps"] else None
    seen["log"] = Path(run, "log.txt").read_text()
    return seen


def saved(run: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whole."""
    parts = []
    index = read_index(run, step)
    assert not isinstance(index, str)
    for entry in index.files:
        tensors = load_file(checkpoint.folder(run, step) / entry.file)
        parts.append([(p.name, p.shape, p.offsets, tensors[p.key]) for p in entry.pieces])
    return whole(parts)


def refused(world: World, cases: list[tuple[str, str, list[str]]]) -> list[str]:
    """The messages with which training refuses to start, for each data set, run and overrides."""
    messages = []
    for data, run, overrides in cases:
        with pytest.raises(UserError) as error:
            train(world, data, run, *overrides)
        messages.append(str(error.value))
    return messages


def files_of(run: Path) -> dict[Path, bytes]:
    """The files of a run's checkpoints."""
    return {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
