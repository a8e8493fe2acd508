"""Tables that have grown continue the rows of a checkpoint, for any optimizer, sharding and number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import Progress
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import NEW, RowSource, start_at_the_mean
from mme.distributed.world import World
from mme.model.feature_rows import FeatureRows, blocks_of
from mme.step import TrainStep
from tests.distributed.processes import run_on
from tests.distributed.test_checkpoint import WIDE, everything
from tests.distributed.test_step import FEATURE_SIZES, FEATURES, NUM_ITEMS, configuration, sequences, whole

GROWN_ITEMS, GROWN_SIZES = 53, {"action": 5, "rating": 5, "segment": 2, "user_id": 11}
SMALL = ["model.num_blocks=1", "model.num_heads=1", "model.moe.num_experts=0", "model.ffn_multiplier=1"]
MODELS = {
    "adam": ["train.table_optimizer=adam"],
    "dense_adam": ["train.table_optimizer=dense_adam"],
    "adagrad": ["train.table_optimizer=adagrad"],
    "rowwise_adagrad": ["train.table_optimizer=rowwise_adagrad"],
    "wide adam": ["train.table_optimizer=adam", *WIDE],
    "wide adagrad": ["train.table_optimizer=adagrad", *WIDE],
}
SHARDINGS = {
    1: [("adam", "auto"), ("rowwise_adagrad", "auto")],
    2: [
        ("adam", "row_wise"),
        ("adam", "table_wise"),
        ("adam", "data_parallel"),
        ("dense_adam", "row_wise"),
        ("adagrad", "row_wise"),
        ("rowwise_adagrad", "row_wise"),
        ("wide adam", "column_wise"),
        ("wide adagrad", "column_wise"),
    ],
    3: [("adam", "row_wise"), ("rowwise_adagrad", "row_wise")],
}


def test_rows_continue_by_place_or_by_match() -> None:
    grown = RowSource(blocks_of({"items": 5, "a": 4}), blocks_of({"items": 3, "a": 2}))
    assert grown.rows(range(9)).tolist() == [0, 1, 2, NEW, NEW, 3, 4, NEW, NEW]
    assert grown.rows(range(2, 7)).tolist() == [2, NEW, NEW, 3, 4]
    assert grown.num_saved == 5
    assert grown.num_new() == {"items": 2, "a": 2}
    # Items in another order, and a column that the checkpoint does not have.
    matches = {"b": torch.tensor([0, NEW]), "items": torch.tensor([2, NEW, 0])}
    joined = RowSource(blocks_of({"items": 3, "b": 2, "c": 1}), blocks_of({"items": 3, "b": 4}), matches)
    assert joined.rows(range(6)).tolist() == [2, NEW, 0, 3, NEW, NEW]
    assert joined.num_new() == {"items": 1, "b": 1, "c": 1}


def saved_blocks() -> dict[str, range]:
    return FeatureRows(configuration(*FEATURES).model, NUM_ITEMS, FEATURE_SIZES).blocks


def save_all(world: World, folder: str) -> dict[str, Any]:
    """Trains each model for two steps and writes a checkpoint."""
    saved = {}
    for name, model in MODELS.items():
        config = configuration("train.table_lr=0.001", *FEATURES, *SMALL, *model)
        recommender = Recommender(config, NUM_ITEMS, world, FEATURE_SIZES)
        step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=9)
        for number in range(2):
            step(number, sequences([0, 1, 2, 3, 4], with_features=True))
        with CheckpointWriter(Path(folder) / name, recommender, keep=1) as writer:
            writer.save(Progress(2, 0, 2))
        saved[name] = everything(recommender)
    return saved


def grow_all(world: World, folder: str) -> dict[tuple[str, str], Any]:
    """The grown tables' weights as in a new model; all tensors after loading; and after the new rows are set to the mean."""
    found = {}
    for name, sharding in SHARDINGS[world.size]:
        overrides = [*FEATURES, *SMALL, *MODELS[name], f"parallel.table_sharding={sharding}"]
        config = configuration("train.table_lr=0.001", *overrides)
        recommender = Recommender(config, GROWN_ITEMS, world, GROWN_SIZES)
        engine = initialize_engine(recommender.decoder, config)
        as_new = everything(recommender)
        for shard in recommender.tables.weights():
            shard.tensor.fill_(torch.nan)
        source = RowSource(recommender.rows.blocks, saved_blocks())
        recommender.tables.initialise(source.is_new)
        index = checkpoint.newest_sound(Path(folder) / name, world, lambda _: None, "")
        assert index is not None
        checkpoint.load_training(Path(folder) / name, index, recommender, engine, source)
        loaded = everything(recommender)
        start_at_the_mean(recommender, source)
        found[name, sharding] = as_new, loaded, everything(recommender)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The folder of the checkpoints, and the tensors in them."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    (saved,) = run_on(1, save_all, folder)
    return folder, {name: whole([parts]) for name, parts in saved.items()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_grown_tables_continue_the_saved_rows(
    trained: tuple[str, dict[str, dict[str, Tensor]]], processes: int
) -> None:
    folder, saved = trained
    results = run_on(processes, grow_all, folder)
    for name, sharding in SHARDINGS[processes]:
        as_new, loaded, mean = (whole([result[name, sharding][n] for result in results]) for n in range(3))
        assert saved[name].keys() == loaded.keys()
        for tensor, before in saved[name].items():
            if tensor.startswith("tables/"):
                is_state = tensor.count("/") == 2
                check_rows(before, as_new[tensor], loaded[tensor], mean[tensor], is_state)
            else:
                assert torch.equal(loaded[tensor], before), tensor


def check_rows(before: Tensor, as_new: Tensor, loaded: Tensor, mean: Tensor, is_state: bool) -> None:
    """``before`` in the checkpoint; the others in the grown tables, see `grow_all`."""
    blocks = FeatureRows(configuration(*FEATURES).model, GROWN_ITEMS, GROWN_SIZES).blocks
    assert loaded.shape[0] == max(block.stop for block in blocks.values())
    for kind, old in saved_blocks().items():
        continued = slice(blocks[kind].start, blocks[kind].start + len(old))
        new = slice(continued.stop, blocks[kind].stop)
        of_block = before[old.start : old.stop]
        for found in (loaded, mean):
            assert torch.equal(found[continued], of_block)
        if is_state:
            assert not loaded[new].any() and not mean[new].any()
        else:
            assert torch.equal(loaded[new], as_new[new])
            expected = of_block.double().mean(0).float()  # on one process; the same on any number
            assert torch.equal(mean[new], expected.expand(mean[new].shape))
