"""A loss or gradient that is not finite changes nothing, on any rank, and its batch is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.state import optimizer_pieces, weight_pieces
from mme.distributed.world import World
from mme.run.non_finite import save_batch
from mme.step import TrainStep
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration, sequences
from tests.test_train import data, records, train

__all__ = ["data"]  # a fixture
SPLIT = [[0, 3], [1, 2, 4]]


def everything(step: TrainStep) -> dict[str, Tensor]:
    """All weights and optimizer states of this rank, including Adam's counts of steps."""
    recommender = step.recommender
    found = {p.name: p.read().clone() for p in [*weight_pieces(recommender), *optimizer_pieces(recommender)]}
    for name, optimizer in {"decoder": step.engine.optimizer.optimizer, "tables": recommender.tables.optimizer}.items():
        for number, state in enumerate(optimizer.state.values() if optimizer else ()):
            if "step" in state:
                found[f"{name}/{number}/step"] = torch.as_tensor(state["step"]).clone()
    return found


def spoil(recommender: Recommender, where: str) -> Any:
    """Makes the loss, or a gradient of decoder or tables, infinite on this rank; returns a function that undoes it."""
    decoder = recommender.decoder
    if where == "loss":
        return decoder.register_forward_hook(lambda _, __, output: replace(output, hidden=output.hidden * torch.inf))
    if where == "decoder":
        return next(iter(decoder.parameters())).register_hook(lambda gradient: gradient * torch.inf)

    def spoil_rows(_: Any, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].register_hook(lambda gradient: gradient * torch.inf)

    return decoder.register_forward_pre_hook(spoil_rows)


def skip_in_the_middle(world: World, where: str, overrides: list[str]) -> Any:
    """Runs steps 0 and 2 with an infinite step 1 of the last rank between them, and the same steps without step 1."""
    config = configuration("train.table_lr=0.001", *overrides)
    batch = sequences(SPLIT[world.rank])
    losses = []
    for spoiled in (True, False):
        recommender = Recommender(config, NUM_ITEMS, world)
        step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=9)
        assert not step(0, batch).skipped
        if spoiled:
            before = everything(step)
            undo = spoil(recommender, where) if world.rank == world.size - 1 else None
            assert step(1, batch).skipped
            after = everything(step)
            assert before.keys() == after.keys()
            for name, value in before.items():
                assert torch.equal(value, after[name]), name
            if undo is not None:
                undo.remove()
        losses.append([step(number, batch, applied=number - 1).loss for number in (2, 3)])
    assert losses[0] == losses[1]
    return losses[0]


@pytest.mark.parametrize(
    ("where", "overrides"),
    [
        ("loss", ["train.table_optimizer=adam"]),
        ("decoder", ["train.table_optimizer=rowwise_adagrad", "parallel.zero_stage=2"]),
        ("tables", ["train.table_optimizer=sgd"]),
        ("tables", ["train.table_optimizer=adam", "parallel.table_sharding=data_parallel", "train.grad_clip=1"]),
    ],
)
def test_a_spoiled_step_changes_no_bit_on_any_rank(where: str, overrides: list[str]) -> None:
    assert len(run_on(2, skip_in_the_middle, where, overrides)) == 2


def test_the_batch_is_kept_sequence_by_sequence(tmp_path: Path) -> None:
    batch = sequences([1, 3])
    rows = pq.read_table(save_batch(tmp_path, 7, 0, batch)).to_pylist()
    assert [row["user_row"] for row in rows] == [1, 3]
    assert [row["seq_offset"] for row in rows] == [0, 3]
    assert [len(row["timestamps"]) for row in rows] == [4, 2]
    assert [value for row in rows for value in row["item_ids"]] == batch.item_ids.tolist()
    assert [value for row in rows for value in row["target_ids"]] == batch.target_ids.tolist()
    assert [value for row in rows for value in row["timestamps"]] == batch.timestamps.tolist()


def test_the_job_stops_with_one_line_or_skips_as_configured(data: Path, tmp_path: Path) -> None:
    """Scores that are divided by a tiny temperature are not finite."""
    stopped = train(data, tmp_path / "stopped", "loss.temperature=1e-40", "train.steps=3")
    assert stopped.returncode == 1
    (line,) = stopped.stderr.splitlines()
    assert line.startswith("error: ")
    assert "the loss at step 1 is not finite; its batch is in" in line
    assert (tmp_path / "stopped" / "non_finite" / "step_1_rank_0.parquet").is_file()
    skipping = train(data, tmp_path / "run", "loss.temperature=1e-40", "train.steps=3", "train.on_non_finite=skip")
    assert skipping.returncode == 0, skipping.stderr
    assert [line["skipped_steps"] for line in records(tmp_path / "run", "train")] == [1, 2, 3]
    index = json.loads((tmp_path / "run" / "checkpoints" / "step_3" / "index.json").read_text())
    assert index["progress"]["skipped"] == 3
