"""Checkpoints are written in the background. After a kill or failure at any moment, the previous one remains usable."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp

from mme.distributed import checkpoint, checkpoint_index, checkpoint_writer
from mme.distributed.checkpoint_index import Progress
from mme.distributed.checkpoint_writer import CheckpointError, CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World, process_group
from mme.errors import NonFiniteError
from mme.files import sha256_of_blocks
from tests.distributed.processes import run_on
from tests.distributed.test_checkpoint import load_newest
from tests.distributed.test_step import NUM_ITEMS, configuration


def recommender_of(world: World) -> tuple[Recommender, Any]:
    config = configuration("train.table_optimizer=adam", "train.table_lr=0.001")
    recommender = Recommender(config, NUM_ITEMS, world)
    return recommender, initialize_engine(recommender.decoder, config)


def save_until_killed(run: Path, delay_s: float) -> None:
    """Completes step 1, then is killed ``delay_s`` after the file of step 2 has appeared."""
    with process_group() as world, CheckpointWriter(run, recommender_of(world)[0], keep=1) as writer:
        writer.save(Progress(1, 0, 1))
        writer.wait()
        writer.save(Progress(2, 0, 2))
        while not list((run / "checkpoints").glob(".step_2.partial/*.safetensors")):
            time.sleep(0)
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGKILL)


def save_spoiled(world: World, run: str) -> tuple[str, str]:
    """Saves a table with an infinity in row 33, on the last rank; returns type and text of the error."""
    recommender, _ = recommender_of(world)
    for shard in recommender.tables.weights():
        row = 33 - shard.offsets[0]
        if shard.name == "item_0" and 0 <= row < shard.tensor.shape[0]:
            shard.tensor[row, 2] = torch.inf
    with pytest.raises(NonFiniteError) as raised, CheckpointWriter(Path(run), recommender, keep=1) as writer:
        writer.save(Progress(1, 0, 0))
        writer.wait()
    return type(raised.value).__name__, str(raised.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path, world_size: int) -> None:
    for kind, message in run_on(world_size, save_spoiled, str(tmp_path)):
        assert kind == "NonFiniteCheckpointError"
        assert message == "checkpoint of step 1 not written: tables/item_0 is not finite, first in row 33"
    assert checkpoint.steps(tmp_path) == []


def load_and_save(world: World, run: str) -> Any:
    recommender, engine = recommender_of(world)
    notes: list[str] = []
    progress = load_newest(Path(run), recommender, engine, notes)
    with CheckpointWriter(Path(run), recommender, keep=1) as writer:
        writer.resumed_at(progress.step)
        writer.save(Progress(3, 0, 3))
    return progress.step, notes


def test_a_killed_writer_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    moments = random.Random(1)
    for attempt in range(3):
        run = tmp_path / str(attempt)
        process = context.Process(target=save_until_killed, args=(run, moments.choice([0, moments.uniform(0, 0.01)])))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert checkpoint.steps(run) == [1]
        assert (run / "checkpoints" / ".step_2.partial").is_dir()
    assert run_on(2, load_and_save, str(run)) == [(1, [])] * 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_3"]


def save_behind_a_damaged_one(world: World, run: Path, scores: dict[int, float]) -> list[int]:
    recommender, _ = recommender_of(world)
    with CheckpointWriter(run, recommender, keep=2) as writer:
        for step in (1, 9):
            writer.save(Progress(step, 0, step, score=scores.get(step)))
    file = run / "checkpoints" / "step_9" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with CheckpointWriter(run, recommender, keep=1) as writer:  # resumed from an earlier one
        for step in (2, 3):
            writer.save(Progress(step, 0, step, score=scores.get(step)))
    return checkpoint.steps(run)


def test_a_damaged_checkpoint_of_a_later_step_does_not_displace_a_sound_one(tmp_path: Path) -> None:
    assert run_on(1, save_behind_a_damaged_one, tmp_path / "newest", {}) == [[3, 9]]
    scores = {1: 0.2, 9: 0.9, 2: 0.1, 3: 0.1}
    assert run_on(1, save_behind_a_damaged_one, tmp_path / "best", scores) == [[1, 3, 9]]


def save_where_one_cannot(world: World, run: str, rank: int) -> str:
    """A folder blocks the file of ``rank``; the others continue their steps, and all raise at the same step."""
    recommender, _ = recommender_of(world)
    run_folder = Path(run)
    with pytest.raises(CheckpointError) as raised, CheckpointWriter(run_folder, recommender, keep=1) as writer:
        writer.save(Progress(1, 0, 1))
        writer.wait()
        if world.rank == rank:
            write_part = writer._write_part

            def write_over_a_folder(partial: Path, pieces: Any) -> None:
                (partial / f"rank_{rank:05d}.safetensors").mkdir(parents=True)
                write_part(partial, pieces)

            writer._write_part = write_over_a_folder  # type: ignore[method-assign]
        writer.save(Progress(2, 0, 2))
        while True:
            any_writing, any_failed = world.sum(torch.tensor(writer.votes(), dtype=torch.int64)).tolist()
            writer.after_step(any_writing > 0, any_failed > 0)
    return str(raised.value)


def save_without_a_file(world: World, run: str) -> str:
    """The file of the last rank disappears before the checkpoint is complete."""
    recommender, _ = recommender_of(world)
    checkpoint_writer.VISIBLE_WITHIN_S = 0.3  # in this process only
    with pytest.raises(CheckpointError) as raised, CheckpointWriter(Path(run), recommender, keep=1) as writer:
        writer.save(Progress(1, 0, 1))
        if world.rank == world.size - 1:
            writer._join()
            (Path(run) / "checkpoints" / ".step_1.partial" / "rank_00001.safetensors").unlink()
        writer.wait()
    return str(raised.value)


def test_a_checkpoint_is_complete_only_with_every_file_of_its_index(tmp_path: Path) -> None:
    messages = run_on(2, save_without_a_file, str(tmp_path))
    assert messages[0] == messages[1]
    assert messages[0] == (
        f"checkpoint not written: rank 0 does not see {tmp_path}/checkpoints/.step_1.partial/rank_00001.safetensors, which "
        "another rank has written: expected one output_dir that all nodes share"
    )
    assert checkpoint.steps(tmp_path) == []


def test_all_ranks_learn_of_a_failed_write_in_one_line(tmp_path: Path) -> None:
    messages = run_on(2, save_where_one_cannot, str(tmp_path), 1)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        f"checkpoint not written: {tmp_path}/checkpoints/.step_2.partial/rank_00001.safetensors: "
    )
    assert checkpoint.steps(tmp_path) == [1]


def save_where_nothing_can_be_named(world: World, run: str) -> str:
    recommender, _ = recommender_of(world)
    full = mock.patch.object(
        Path, "rename", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    )  # in rank 0's thread
    with (
        full,
        pytest.raises(CheckpointError) as raised,
        CheckpointWriter(Path(run), recommender, keep=1) as writer,
    ):
        writer.save(Progress(1, 0, 1))
        while True:
            any_writing, any_failed = world.sum(torch.tensor(writer.votes(), dtype=torch.int64)).tolist()
            writer.after_step(any_writing > 0, any_failed > 0)
    return str(raised.value)


def test_a_failure_at_the_end_is_reported(tmp_path: Path) -> None:
    messages = run_on(2, save_where_nothing_can_be_named, str(tmp_path))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"checkpoint not written: {tmp_path}/checkpoints/step_1: ")
    assert checkpoint.steps(tmp_path) == []


def save_on_and_on(run: Path, announced: Any) -> None:
    """Writes checkpoints endlessly and announces each when it is complete."""
    with process_group() as world, CheckpointWriter(run, recommender_of(world)[0], keep=2) as writer:
        for step in itertools.count(1):
            writer.save(Progress(step, 0, step))
            writer.wait()
            announced.send(step)


@pytest.mark.slow
def test_no_announced_checkpoint_is_lost_by_a_kill(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    moments = random.Random(2)
    for attempt in range(10):
        run = tmp_path / str(attempt)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_on_and_on, args=(run, sender))
        process.start()
        sender.close()
        assert receiver.poll(300)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        announced = 0
        with suppress(EOFError):
            while True:
                announced = receiver.recv()
        newest = checkpoint.steps(run)[-1]
        assert newest >= announced
        for step in checkpoint.steps(run):
            index = json.loads((checkpoint.folder(run, step) / checkpoint_index.INDEX).read_text())
            assert index["progress"]["step"] == step
            for entry in index["files"]:
                assert sha256_of_blocks(checkpoint.folder(run, step) / entry["file"]) == entry["sha256"]
