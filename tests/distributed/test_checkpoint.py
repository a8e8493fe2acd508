"""Checkpoints hold everything, load at another number of processes, and damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mme.distributed import checkpoint
from mme.distributed.checkpoint import Progress
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.groups import World
from mme.distributed.recommender import Recommender
from mme.distributed.state import optimizer_pieces, weight_pieces
from mme.errors import UserError
from mme.step import TrainStep
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration, sequences, whole

SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 3], [1, 2, 4]]}


def everything(recommender: Recommender) -> list[Any]:
    pieces = [*weight_pieces(recommender), *optimizer_pieces(recommender)]
    return [(piece.name, piece.shape, piece.offsets, piece.read().clone()) for piece in pieces]


def train_and_save(world: World, run: str, overrides: list[str]) -> Any:
    config = configuration("train.table_lr=0.001", *overrides)
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=9)
    with CheckpointWriter(Path(run), recommender, keep=1) as writer:
        for number in range(3):
            step(number, sequences(SPLITS[world.size][world.rank]))
            writer.save(Progress(number + 1, 0, number + 1, score=-number))
        saved = everything(recommender)
        # The steps that follow change nothing of what is being written.
        losses = [step(number, sequences(SPLITS[world.size][world.rank])).loss for number in (3, 4)]
    return saved, losses


def load_and_train(world: World, run: str, overrides: list[str]) -> Any:
    config = configuration("train.table_lr=0.001", *overrides)
    recommender = Recommender(config, NUM_ITEMS, world)
    engine = initialize_engine(recommender.decoder, config)
    notes: list[str] = []
    progress = checkpoint.load_training(Path(run), recommender, engine, notes.append)
    loaded = everything(recommender)
    step = TrainStep(config, recommender, engine, total_steps=9)
    losses = [step(number, sequences(SPLITS[world.size][world.rank])).loss for number in (3, 4)]
    return loaded, losses, progress, notes


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_a_checkpoint_loads_at_another_size(tmp_path: Path, optimizer: str) -> None:
    overrides = [f"train.table_optimizer={optimizer}"]
    saved = run_on(2, train_and_save, str(tmp_path), overrides)
    wanted, losses = whole([parts for parts, _ in saved]), saved[0][1]
    assert checkpoint.steps(tmp_path) == [1, 3]  # the best by score and the newest

    same = run_on(2, load_and_train, str(tmp_path), overrides)
    assert same[0][2] == Progress(3, 0, 3, score=-2)
    assert same[0][1] == losses  # bit for bit
    alone = run_on(1, load_and_train, str(tmp_path), [*overrides, "parallel.table_sharding=table_wise"])
    assert alone[0][1] == pytest.approx(losses, rel=1e-5)
    for results in (same, alone):
        for name, found in whole([parts for parts, *_ in results]).items():
            assert torch.equal(found, wanted[name]), name


def load_damaged(world: World, run: str) -> Any:
    recommender = Recommender(configuration("train.table_lr=0.001"), NUM_ITEMS, world)
    engine = initialize_engine(recommender.decoder, recommender.config)
    notes: list[str] = []
    progress = checkpoint.load_training(Path(run), recommender, engine, notes.append)
    with pytest.raises(UserError) as damaged:
        checkpoint.load_weights(Path(run), 3, recommender)
    with pytest.raises(UserError) as missing:
        checkpoint.load_weights(Path(run), 7, recommender)
    other = Recommender(configuration("model.embedding_dim=32"), NUM_ITEMS, world)
    with pytest.raises(UserError) as mismatch:
        checkpoint.load_weights(Path(run), 1, other)
    return progress, notes, str(damaged.value), str(missing.value), str(mismatch.value)


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), [])
    file = tmp_path / "checkpoints" / "step_3" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "checkpoints" / ".step_9.partial").mkdir()
    ((progress, notes, damaged, missing, mismatch),) = run_on(1, load_damaged, str(tmp_path))
    assert progress.step == 1
    assert notes == [f"checkpoint passed over: {damaged}"]
    assert damaged == f"{file}: damaged: its SHA-256 is not the one in index.json"
    assert missing.endswith("step_7: no such checkpoint (complete ones: 1, 3)")
    assert "tensor tables/item_0 has shape [40, 8], expected [40, 16]" in mismatch
