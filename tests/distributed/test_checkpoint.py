"""Checkpoints are complete, load on any number of processes, and damage is detected."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mme.distributed import checkpoint, checkpoint_index
from mme.distributed.checkpoint_index import Progress
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.state import optimizer_pieces, weight_pieces
from mme.distributed.world import World
from mme.errors import UserError
from mme.files import sha256, sha256_of_blocks
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
        # Later steps do not change what is being written.
        losses = [step(number, sequences(SPLITS[world.size][world.rank])).loss for number in (3, 4)]
    return saved, losses


ADVICE = "train.resume=false removes them"


def load_newest(run: Path, recommender: Recommender, engine: Any, notes: list[str]) -> Progress:
    index = checkpoint.newest_sound(run, recommender.world, notes.append, ADVICE)
    assert index is not None
    checkpoint.load_training(run, index, recommender, engine)
    return index.progress


def load_and_train(world: World, run: str, overrides: list[str]) -> Any:
    config = configuration("train.table_lr=0.001", *overrides)
    recommender = Recommender(config, NUM_ITEMS, world)
    engine = initialize_engine(recommender.decoder, config)
    notes: list[str] = []
    progress = load_newest(Path(run), recommender, engine, notes)
    loaded = everything(recommender)
    step = TrainStep(config, recommender, engine, total_steps=9)
    losses = [step(number, sequences(SPLITS[world.size][world.rank])).loss for number in (3, 4)]
    return loaded, losses, progress, notes


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_a_checkpoint_loads_on_another_number_of_processes(tmp_path: Path, optimizer: str) -> None:
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


WIDE = ["model.num_tables=1", "model.embedding_dim=512"]  # wide enough for several pieces of a row on each rank


@pytest.mark.parametrize(
    ("optimizer", "saved_as", "loaded_as", "model"),
    [
        ("adagrad", "row_wise", "data_parallel", []),
        ("rowwise_adagrad", "data_parallel", "row_wise", []),
        ("rowwise_adagrad", "row_wise", "data_parallel", []),
        ("adam", "column_wise", "row_wise", WIDE),
        ("adam", "row_wise", "column_wise", WIDE),
        ("adagrad", "column_wise", "row_wise", WIDE),
    ],
)
def test_a_checkpoint_loads_with_another_sharding_of_the_tables(
    tmp_path: Path, optimizer: str, saved_as: str, loaded_as: str, model: list[str]
) -> None:
    overrides = [f"train.table_optimizer={optimizer}", *model]
    saved = run_on(2, train_and_save, str(tmp_path), [*overrides, f"parallel.table_sharding={saved_as}"])
    loaded = run_on(2, load_and_train, str(tmp_path), [*overrides, f"parallel.table_sharding={loaded_as}"])
    wanted = whole([parts for parts, _ in saved])
    assert sum(name.startswith("tables/item_0/") for name in wanted) == (2 if optimizer == "adam" else 1)
    found = whole([parts for parts, *_ in loaded])
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert loaded[0][1] == pytest.approx(saved[0][1], rel=1e-5)


def load_damaged(world: World, run: str) -> Any:
    recommender = Recommender(configuration("train.table_lr=0.001"), NUM_ITEMS, world)
    engine = initialize_engine(recommender.decoder, recommender.config)
    notes: list[str] = []
    progress = load_newest(Path(run), recommender, engine, notes)
    with pytest.raises(UserError) as damaged:
        checkpoint.best_sound(Path(run), 3, world)
    passed_over: list[str] = []
    best = checkpoint.best_sound(Path(run), None, world, passed_over.append)
    assert best.progress.step == 1
    assert passed_over == notes
    with pytest.raises(UserError) as missing:
        checkpoint.best_sound(Path(run), 7, world)
    other = Recommender(configuration("model.embedding_dim=32"), NUM_ITEMS, world)
    with pytest.raises(UserError) as mismatch:
        checkpoint.load_weights(Path(run), best, other)
    return progress, notes, str(damaged.value), str(missing.value), str(mismatch.value)


def test_a_truncated_checkpoint_is_skipped(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), [])
    file = tmp_path / "checkpoints" / "step_3" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    in_index(lambda index: index["progress"].update(score=5.0))(file.parent)  # the newest, and the best
    (tmp_path / "checkpoints" / ".step_9.partial").mkdir()
    ((progress, notes, damaged, missing, mismatch),) = run_on(1, load_damaged, str(tmp_path))
    assert progress.step == 1
    assert notes == [f"checkpoint skipped: {damaged}"]
    assert damaged == f"{file}: damaged: its SHA-256 is not the one in index.json"
    assert missing.endswith("step_7: no such checkpoint (complete ones: 1, 3)")
    assert "tensor tables/item_0 has shape [40, 8], expected [40, 16]" in mismatch


def resume_from_damaged(world: World, run: str) -> str:
    with pytest.raises(UserError) as refused:
        checkpoint.newest_sound(Path(run), world, lambda _: None, ADVICE)
    return str(refused.value)


def test_training_does_not_start_over_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    run_on(1, train_and_save, str(tmp_path), [])
    for file in tmp_path.glob("checkpoints/step_*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    (message,) = run_on(1, resume_from_damaged, str(tmp_path))
    newest = tmp_path / "checkpoints" / "step_3" / "rank_00000.safetensors"
    assert message.startswith(f"{tmp_path}/checkpoints: no sound checkpoint among 2, the newest: {newest}: damaged: ")
    assert message.endswith(f"; {ADVICE}")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def in_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return tamper


def plant_pickle(folder: Path) -> None:
    """Replaces the tensors, with a matching checksum."""
    file = folder / "rank_00000.safetensors"
    file.write_bytes(pickle.dumps(Bomb(folder.parent / "executed")))
    in_index(lambda index: index["files"][0].update(sha256=sha256_of_blocks(file)))(folder)


def in_file(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes tensors and the checksum to match."""

    def tamper(folder: Path) -> None:
        file = folder / "rank_00000.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        in_index(lambda index: index["files"][0].update(sha256=sha256_of_blocks(file)))(folder)

    return tamper


def to_half(tensors: dict[str, torch.Tensor]) -> None:
    tensors["tables/item_0@0,0"] = tensors["tables/item_0@0,0"].half()


def a_link_in_the_place_of_the_file(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")


def first_piece(index: dict[str, Any]) -> dict[str, Any]:
    return next(piece for piece in index["files"][0]["pieces"] if piece["name"] == "tables/item_0")


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (plant_pickle, "rank_00000.safetensors: damaged: not a safetensors file ("),
    "file gone": (lambda folder: (folder / "rank_00000.safetensors").unlink(), "rank_00000.safetensors: No such file"),
    "index cut off": (
        lambda folder: (folder / "index.json").write_text('{"format": 3, "fi'),
        "index.json: damaged index (",
    ),
    "another format": (
        in_index(lambda index: index.update(format=1)),
        "index.json: format 1, expected 3: written by another",
    ),
    "a number beyond 64 bits": (
        in_index(lambda index: index["progress"].update(rows={"items": 2**70})),
        "damaged index (progress.rows.items: ",
    ),
    "another step": (in_index(lambda index: index["progress"].update(step=9)), "damaged index (belongs to step 9)"),
    "a file elsewhere": (
        in_index(lambda index: index["files"][0].update(file="../step_1/rank_00000.safetensors")),
        "damaged index (file '../step_1/rank_00000.safetensors' is not in this folder)",
    ),
    "a piece too many": (
        in_index(
            lambda index: index["files"][0]["pieces"].append(
                {"name": "decoder/x", "shape": [2], "offsets": [0], "local_shape": [2]}
            )
        ),
        "rank_00000.safetensors: damaged: has no piece decoder/x@0, which index.json names",
    ),
    "no file": (in_index(lambda index: index["files"].clear()), "damaged index (files: 0 entries, expected 1)"),
    "a piece twice": (
        in_index(lambda index: index["files"][0]["pieces"].append(first_piece(index))),
        "damaged index (tensor tables/item_0: its pieces do not cover it exactly)",
    ),
    "a smaller piece": (
        in_index(lambda index: first_piece(index).update(local_shape=[39, 8])),
        "damaged index (tensor tables/item_0: its pieces do not cover it exactly)",
    ),
    "a piece beside the tensor": (
        in_index(lambda index: first_piece(index).update(offsets=[1, 0])),
        "damaged index (tensor tables/item_0: the piece tables/item_0@1,0 does not fit into the shape [40, 8])",
    ),
    "no field": (in_index(lambda index: index["files"][0].pop("sha256")), "(files[0].sha256: Field required)"),
    "another type": (
        in_index(lambda index: index["progress"].update(epoch="0")),
        "damaged index (progress.epoch: Input should be a valid integer)",
    ),
    "no number": (
        in_index(lambda index: index["progress"].update(score=float("nan"))),
        "damaged index (progress.score: Input should be a finite number)",
    ),
    "not finite": (
        in_file(lambda tensors: tensors["tables/item_0@0,0"][39].fill_(torch.nan)),
        "rank_00000.safetensors: damaged: piece tables/item_0@0,0 is not finite",
    ),
    "another dtype": (in_file(to_half), "damaged: piece tables/item_0@0,0 is F16, expected F32"),
    "a link": (
        a_link_in_the_place_of_the_file,
        "rank_00000.safetensors: a symbolic link, which is not followed here",
    ),
}


def load_tampered(world: World, run: Path) -> dict[str, tuple[Any, list[str]]]:
    recommender = Recommender(configuration("train.table_lr=0.001"), NUM_ITEMS, world)
    engine = initialize_engine(recommender.decoder, recommender.config)
    found: dict[str, tuple[Any, list[str]]] = {}
    sound = run.parent / "sound"
    shutil.copytree(run / "checkpoints" / "step_3", sound)
    for name, (tamper, _) in TAMPERED.items():
        shutil.rmtree(run / "checkpoints" / "step_3")
        shutil.copytree(sound, run / "checkpoints" / "step_3")
        tamper(run / "checkpoints" / "step_3")
        notes: list[str] = []
        found[name] = load_newest(run, recommender, engine, notes), notes
    return found


def test_a_malicious_checkpoint_is_skipped_and_not_executed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_on(1, train_and_save, str(run), [])
    (found,) = run_on(1, load_tampered, run)
    for name, (_, message) in TAMPERED.items():
        progress, (note,) = found[name]
        assert progress.step == 1, name
        assert message in note and "\n" not in note, note
    assert not (run / "checkpoints" / "executed").exists()
    pickle.loads(pickle.dumps(Bomb(run / "checkpoints" / "executed")))
    assert (run / "checkpoints" / "executed").exists()  # the payload works if it is unpickled
    check_format_2(run)


def check_format_2(run: Path) -> None:
    """A checkpoint of format 2, with the sum of the whole file, is still read and checked."""
    file = checkpoint.folder(run, 1) / "rank_00000.safetensors"

    def as_before(index: dict[str, Any]) -> None:
        (entry,) = index["files"]
        index.update(format=2, files=[{"file": entry["file"], "sha256": sha256(file), "pieces": entry["pieces"]}])

    in_index(as_before)(checkpoint.folder(run, 1))
    index = checkpoint_index.read_index(run, 1)
    assert not isinstance(index, str)
    assert checkpoint_index.damage(run, 1, index.files) is None
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "damaged: its SHA-256 is not the one" in str(checkpoint_index.damage(run, 1, index.files))


def load_without_a_rank(world: World, run: Path) -> Any:
    with pytest.raises(UserError) as refused:
        checkpoint.best_sound(run, 3, world)
    return str(refused.value)


def test_an_index_without_a_ranks_file_is_rejected(tmp_path: Path) -> None:
    run_on(2, train_and_save, str(tmp_path), [])
    step = tmp_path / "checkpoints" / "step_3"
    assert [(step / name).stat().st_mode & 0o777 for name in ("rank_00001.safetensors", "index.json")] == [0o644] * 2
    in_index(lambda index: index["files"].pop())(step)
    (found,) = run_on(1, load_without_a_rank, tmp_path)
    assert found == f"{step / 'index.json'}: damaged index (files: 1 entries, expected 2)"
    in_index(lambda index: index.pop("num_files"))(step)  # as an older version wrote it
    (found,) = run_on(1, load_without_a_rank, tmp_path)
    assert found == f"{step / 'index.json'}: damaged index (tensor tables/item_0: its pieces do not cover it exactly)"


def test_checkpoints_behind_a_link_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine" / "step_1").mkdir(parents=True)
    (tmp_path / "mine" / "step_1" / "index.json").touch()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"run/checkpoints: a symbolic link, which is not followed here"):
        checkpoint.remove_all(tmp_path / "run")
    assert (tmp_path / "mine" / "step_1" / "index.json").exists()
    assert checkpoint.steps(tmp_path / "mine") == []
    assert checkpoint_index.steps(tmp_path) == []


@pytest.mark.parametrize(
    ("boxes", "overlap"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (2, 4))], False),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], True),
        ([((0, 0), (4, 2)), ((0, 2), (2, 2)), ((2, 2), (2, 2))], False),
        ([((0, 0), (4, 2)), ((0, 2), (3, 2)), ((2, 2), (2, 2))], True),
        ([((), ())], False),
    ],
)
def test_overlapping_pieces_are_found(boxes: list[Any], overlap: bool) -> None:
    pieces = [checkpoint_index.PieceEntry("x", (4, 4), offsets, shape) for offsets, shape in boxes]
    assert checkpoint_index._overlap(pieces) is overlap
