"""Incremental checkpoints resume exactly, on any number of processes, and fall back to a whole one if a link is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import Index, Progress
from mme.distributed.checkpoint_parts import changed_rows, checked, parts_of
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import RowSource
from mme.distributed.world import World
from mme.errors import UserError
from mme.inference.weights import read_checkpoint
from mme.step import TrainStep
from tests.distributed.processes import run_on
from tests.distributed.test_checkpoint import everything, load_newest
from tests.distributed.test_step import FEATURE_SIZES, FEATURES, configuration, sequences, whole

NUM_ITEMS = 400  # of which a step touches few
SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 3], [1, 2, 4]], 3: [[0, 3], [1, 2], [4]]}
OPTIONS = [*FEATURES, "loss.num_negatives=2", "train.table_lr=0.001"]


def model(
    world: World, optimizer: str, num_items: int = NUM_ITEMS, loss: str = "sampled_softmax"
) -> tuple[Recommender, TrainStep]:
    config = configuration(*OPTIONS, f"loss.kind={loss}", f"train.table_optimizer={optimizer}")
    recommender = Recommender(config, num_items, world, FEATURE_SIZES)
    return recommender, TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=9)


def train_and_save(world: World, run: str, optimizer: str, keep: int, loss: str = "sampled_softmax") -> Any:
    recommender, step = model(world, optimizer, loss=loss)
    with CheckpointWriter(Path(run), recommender, keep, incremental=2) as writer:
        for number in range(6):
            step(number, sequences(SPLITS[world.size][world.rank], True))
            writer.save(Progress(number + 1, 0, number + 1, score=-number))
    saved = everything(recommender)
    return saved, [step(number, sequences(SPLITS[world.size][world.rank], True)).loss for number in (6, 7)]


def load_and_train(world: World, run: str, optimizer: str) -> Any:
    recommender, step = model(world, optimizer)
    notes: list[str] = []
    progress = load_newest(Path(run), recommender, step.engine, notes)
    loaded = everything(recommender)
    losses = [step(number, sequences(SPLITS[world.size][world.rank], True)).loss for number in (6, 7)]
    return loaded, losses, progress.step, notes


def size_of(run: Path, step: int) -> int:
    return sum(file.stat().st_size for file in (run / f"checkpoints/step_{step}").glob("*.safetensors"))


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_an_incremental_checkpoint_resumes_exactly_on_any_number_of_processes(tmp_path: Path, optimizer: str) -> None:
    saved = run_on(2, train_and_save, str(tmp_path), optimizer, 9)
    wanted, losses = whole([parts for parts, _ in saved]), saved[0][1]
    bases = {
        step: json.loads((tmp_path / f"checkpoints/step_{step}/index.json").read_text()).get("base")
        for step in range(1, 7)
    }
    assert {step: base and base["step"] for step, base in bases.items()} == {1: None, 2: 1, 3: 1, 4: None, 5: 4, 6: 4}
    for processes in (2, 1, 3):
        found = run_on(processes, load_and_train, str(tmp_path), optimizer)
        loaded = whole([parts for parts, *_ in found])
        assert loaded.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(loaded[name], value), name
        assert [of_rank[2:] for of_rank in found] == [(6, [])] * processes
        if processes == 2:
            assert found[0][1] == losses
        else:
            torch.testing.assert_close(torch.tensor(found[0][1]), torch.tensor(losses), rtol=1e-5, atol=0)
    weights = read_checkpoint(tmp_path, 6).weights  # without a process group
    assert all(torch.equal(value, wanted[name]) for name, value in weights.items())
    assert weights["tables/item_0"].shape[0] > NUM_ITEMS


def test_rows_that_have_not_changed_are_not_written(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), "adam", 9)
    tables = 3 * 4 * 16 * (NUM_ITEMS + sum(FEATURE_SIZES.values()))
    assert size_of(tmp_path, 1) - size_of(tmp_path, 2) > 0.5 * tables


def test_a_checkpoint_of_many_changed_rows_is_whole(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), "adam", 9, "full_softmax")  # whose gradient covers every item
    assert all("base" not in json.loads(index.read_text()) for index in tmp_path.glob("checkpoints/*/index.json"))


def test_pruning_keeps_the_base_of_what_it_keeps(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), "adam", 1)
    assert checkpoint.steps(tmp_path) == [1, 4, 6]  # the best, and the newest with its base


def damaged(run: Path, to: Path, step: int) -> Path:
    """A copy of the run with a flipped bit in a file of this step's checkpoint."""
    shutil.copytree(run, to)
    file = to / f"checkpoints/step_{step}/rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return to


def test_a_damaged_link_falls_back_to_a_sound_checkpoint_with_one_line_each(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_on(1, train_and_save, str(run), "adam", 9)
    ((_, _, step, notes),) = run_on(1, load_and_train, str(damaged(run, tmp_path / "link", 6)), "adam")
    assert step == 5 and len(notes) == 1 and "step_6" in notes[0] and "its SHA-256 is not the one" in notes[0]
    ((_, _, step, notes),) = run_on(1, load_and_train, str(damaged(run, tmp_path / "base", 4)), "adam")
    assert step == 3 and len(notes) == 3 and all("step_4" in note for note in notes)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints/step_4")
    shutil.copytree(other / "checkpoints/step_1", other / "checkpoints/step_4")
    index = other / "checkpoints/step_4/index.json"
    index.write_text(index.read_text().replace('"step": 1,', '"step": 4,', 1))
    ((_, _, step, notes),) = run_on(1, load_and_train, str(other), "adam")
    assert step == 4 and "needs the checkpoint of step 4, which has been replaced by another one" in notes[0]


def test_a_base_that_disappears_while_it_is_read_ends_with_its_name(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), "adam", 9)
    index = checked(tmp_path, 6)
    assert isinstance(index, Index)
    shutil.rmtree(tmp_path / "checkpoints/step_4")  # as a running job does when it keeps only newer ones
    with pytest.raises(UserError, match=r"step_6: needs the checkpoint of step 4: .*no such checkpoint"):
        parts_of(tmp_path, index)


def load_grown(world: World, run: str) -> Any:
    recommender, step = model(world, "adam", NUM_ITEMS + 7)
    before = {name: range(0, 0) for name in recommender.rows.blocks}
    start = 0
    for name, block in recommender.rows.blocks.items():
        length = len(block) - 7 * (name == "items")
        before[name] = range(start, start + length)
        start += length
    source = RowSource(recommender.rows.blocks, before)
    index = checkpoint.newest_sound(Path(run), world, lambda _: None, "")
    assert index is not None and index.base is not None
    checkpoint.load_training(Path(run), index, recommender, step.engine, source)
    return everything(recommender)


def test_a_grown_set_continues_an_incremental_checkpoint(tmp_path: Path) -> None:
    ((saved, _),) = run_on(1, train_and_save, str(tmp_path), "adam", 9)
    wanted, grown = whole([saved]), whole(run_on(2, load_grown, str(tmp_path)))
    for name, value in wanted.items():
        if name.startswith("tables/"):
            assert torch.equal(grown[name][:NUM_ITEMS], value[:NUM_ITEMS]), name
            assert torch.equal(grown[name][NUM_ITEMS + 7 :], value[NUM_ITEMS:]), name


def test_changed_rows_are_found_by_their_bits() -> None:
    before = torch.zeros(7, 3)
    now = before.clone()
    now[2, 1], now[5, 0] = 1.0, -0.0
    assert changed_rows(before, now).tolist() == [2, 5]
    assert changed_rows(before[:, 0], now[:, 0]).tolist() == [5]
    assert changed_rows(before[:0], now[:0]).tolist() == []
