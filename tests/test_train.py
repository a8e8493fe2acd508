"""Whole training jobs with the real command: a seed determines the bits, and a stopped run resumes exactly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mme.config import load_config
from mme.data.dataset import PreparedDataset
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.world import World
from mme.prepare.synthetic import prepare_synthetic
from mme.prepare.writer import DatasetWriter
from mme.run.preemption import Preemption
from mme.training import Training
from tests.distributed.processes import run_on

SMALL = [
    "data.max_seq_len=16",
    "data.batch_size=16",
    "model.num_tables=2",
    "model.embedding_dim=16",
    "model.moe.num_experts=4",
    "train.log_every=1",
    "train.epochs=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "small"
    prepare_synthetic("quickstart", folder, users=100, items=120, seed=3)
    return folder


def train(data: Path, run: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    command += ["mme", "train", "--config", str(config), f"data.path={data}", f"output_dir={run}", *SMALL, *overrides]
    # As in a user's terminal; Triton's interpreter is only for tests of kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in records(run, "train")]


def metrics(run: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in records(run, "eval") if line["split"] == split]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["loss.sampling=popularity", "loss.log_q_correction=true"], marks=pytest.mark.slow),
    ],
    ids=["as configured", "popularity"],
)
def test_a_stopped_run_resumes_bit_for_bit(data: Path, tmp_path: Path, overrides: list[str]) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(data, whole, *overrides)
    assert done.returncode == 0, done.stderr
    assert train(data, stopped, "train.steps=5", *overrides).returncode == 0  # in the middle of an epoch of seven steps
    assert train(data, stopped, *overrides).returncode == 0
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 14
    assert metrics(stopped, "valid")[-2:] == metrics(whole, "valid")[-2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [
            "loss.negatives=shared",
            "loss.num_negatives=64",
            "loss.negative_group_size=32",
            "data.protocol=leave_one_out",
        ],
        ["loss.kind=full_softmax", "data.protocol=global_time", "parallel.table_sharding=table_wise"],
        [
            "model.num_tables=1",
            "model.moe.num_experts=0",
            "train.table_optimizer=rowwise_adagrad",
            "data.tokens_per_batch=200",
            "data.windows=sliding",
            "data.window_stride=8",
            "data.readers=2",
        ],
        [
            "model.moe.placement=[1]",
            "model.score_norm=per_view",
            "loss.views=each",
            "parallel.zero_stage=2",
            "train.grad_clip=1",
        ],
        ["train.precision=bfloat16", "train.recompute=blocks", "model.moe.capacity_factor=1", "train.log_every=1"],
        ["loss.sampling=in_batch", "loss.uniform_share=0.5", "loss.log_q_correction=true", "train.micro_batches=2"],
    ],
    ids=["shared", "full softmax", "fuxi-alpha", "placement, views apart", "bfloat16 within capacity", "in batch"],
)
def test_two_processes_repeat_their_losses(data: Path, tmp_path: Path, overrides: list[str]) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        done = train(data, run, *overrides, processes=2)
        assert done.returncode == 0, done.stderr
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0])[-1][1] < losses(runs[0])[0][1]
    model, popularity = metrics(runs[0], "test")[-2:]
    assert popularity["model"] == "popularity"
    assert model["targets_sha256"] == popularity["targets_sha256"]
    with_capacity = "model.moe.capacity_factor=1" in overrides
    for record in records(runs[0], "experts"):
        assert ("dropped" in record) == with_capacity
        for first, second in record.get("dropped", []):  # the first view's rows have priority and may all fit
            assert 0 <= first < 1 and 0 < second < 1
    assert {"protocol", "sort_rule", "hr@10", "hr@50", "ndcg@10", "ndcg@50", "mrr"} <= set(model)


@pytest.mark.slow
def test_with_other_global_batches_every_sequence_is_trained_on_once(data: Path, tmp_path: Path) -> None:
    """Two processes with batches of 16 do two steps, and one with batches of 12 does the rest: 100 = 2 · 32 + 3 · 12."""
    run = tmp_path / "run"
    assert train(data, run, "train.steps=2", processes=2).returncode == 0
    again = train(data, run, "data.batch_size=12")
    assert again.returncode == 0, again.stderr
    steps = [(line["step"], line["epoch"]) for line in records(run, "train")]
    assert steps == [*((step, 0) for step in range(1, 6)), *((step, 1) for step in range(6, 15))]
    index = json.loads((run / "checkpoints" / "step_14" / "index.json").read_text())
    assert (index["progress"]["epoch"], index["progress"]["sequences"]) == (2, 0)


def test_a_split_without_targets_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "one user leaves before the other comes"
    with DatasetWriter(data) as writer:
        items, times = np.array([0, 1, 2, 0, 1, 2]), np.array([1, 2, 3, 10, 11, 12])
        writer.add(pa.array([7, 8]), np.array([0, 3, 6]), items, times)
        writer.finish({"name": "short", "sort_rule": "by time"}, pa.array([30, 31, 32]), np.array([2, 2, 2]))
    refused = train(data, tmp_path / "run", "data.protocol=global_time", "data.global_time_test_fraction=0.5")
    assert refused.returncode == 2
    assert refused.stderr == f"error: {data}: no user has an event for the test split of data.protocol=global_time\n"


def train_with_a_slow_disk(world: World, data: str, run: str) -> tuple[list[int], list[str]]:
    """The steps done before the first checkpoint was written, and the splits that were evaluated in the end.

    The data set's folder is gone by then.
    """
    config = load_config(
        Path(__file__).parents[1] / "configs" / "quickstart.yaml", [f"data.path={data}", f"output_dir={run}", *SMALL]
    )
    dataset = PreparedDataset.open(data)
    with Preemption() as preemption:
        training = Training(config, dataset, world, preemption)
        shutil.rmtree(data)
        done: list[int] = []
        beyond, before = threading.Event(), []
        write, record = CheckpointWriter._write_part, Training._record

        def write_slowly(*arguments: Any) -> None:
            beyond.wait(60)
            before.append(max(done))
            write(*arguments)

        def note(self: Training, monitor: Any, step: int, *rest: Any) -> None:
            record(self, monitor, step, *rest)
            done.append(step)
            if step == 9:
                beyond.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointWriter, "_write_part", write_slowly)
            patch.setattr(Training, "_record", note)
            records_of_test = training.run()
    return before, [line["split"] for line in records_of_test]


def test_checkpoints_are_written_in_the_background_and_the_data_set_may_disappear(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    ((before, splits),) = run_on(1, train_with_a_slow_disk, str(copy), str(tmp_path / "run"))
    assert before[0] >= 9  # the first checkpoint is that of step 7
    assert splits == ["test", "test"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs where there is a GPU")
def test_a_backend_that_cannot_run_here_is_refused(data: Path, tmp_path: Path) -> None:
    refused = train(data, tmp_path / "run", "kernels.backend=triton")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: kernels.backend: backend ('triton')")


def test_a_checkpoint_of_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(data, run, "train.steps=1", "model.moe.top_k=1")
    assert first.returncode == 0
    assert "warning: model.moe.top_k=1 with renormalize=true gives" in first.stdout
    refused = train(data, run, "model.embedding_dim=32")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "belongs to another model configuration" in refused.stderr


def test_starting_over_removes_the_previous_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run).returncode == 0
    done = train(data, run, "train.resume=false", "train.epochs=1", "train.seed=1")
    assert done.returncode == 0, done.stderr
    assert "train.resume=false: 2 checkpoints of the previous run are removed" in done.stdout
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_7"]
    assert [step for step, _ in losses(run)] == list(range(1, 8))
    assert metrics(run, "test")[0]["step"] == 7
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_a_finished_run_reports_changed_settings_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, "train.epochs=1").returncode == 0
    again = train(data, run, "train.epochs=1", "train.lr=0.5")
    assert again.returncode == 0, again.stderr
    assert "resumes with train.lr 0.5 (was 0.004)" in again.stdout
    assert "training is complete: the checkpoint of step 7 is tested again" in again.stdout

    prepare_synthetic("quickstart", tmp_path / "other", users=100, items=120, seed=4)
    refused = train(tmp_path / "other", run, "train.epochs=2")
    assert refused.returncode == 2
    assert "step_7: was trained on a data set that is neither data.path=" in refused.stderr
    assert refused.stderr.count("\n") == 1
