"""A profile attributes each moment of a step to a part, and does not change what the steps compute."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mme.config import load_config, validate_world_size
from mme.errors import UserError
from mme.model.decoder import Decoder
from mme.prepare.synthetic import prepare_synthetic
from mme.profiling.profile import StepProfile
from mme.profiling.regions import REGIONS, each_in_region, region
from mme.profiling.trace import Trace
from tests.test_train import losses, train


def event(category: str, name: str, start: float, end: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return event("user_annotation", name, start, end)


def test_each_moment_of_a_cpu_counts_once() -> None:
    forward, backward = {"Sequence number": 7}, {"Sequence number": 7, "Fwd thread id": 1}
    of_backward = "autograd::engine::evaluate_function: "
    events = [
        mark("ProfilerStep#5", 0, 1000),
        mark("data", 0, 100),
        mark("lookup", 100, 300),
        event("cpu_op", "c10d::alltoall_base_", 120, 140),
        event("user_annotation", "gloo:all_to_all", 130, 250, thread=9),
        event("cpu_op", "aten::copy_", 200, 230),  # hides part of the exchange
        mark("attention", 300, 500),
        event("cpu_op", "aten::detach", 310, 320, **forward),
        event("cpu_op", "aten::mm", 320, 480, **forward),
        event("cpu_op", "aten::silu", 500, 520, **{"Sequence number": 8}),  # belongs to no part
        mark("backward", 600, 900),
        event("cpu_op", f"{of_backward}MmBackward0", 650, 800, **backward),
        event("cpu_op", "aten::mm", 660, 780),
        event("cpu_op", f"{of_backward}torch::autograd::AccumulateGrad", 800, 850),
        event("cpu_op", "aten::mm", 1000, 2000),  # after the profiled step
    ]
    found = Trace(events).time_by_part()
    assert found.steps == 1
    assert found.step_ms == pytest.approx(1)
    assert found.communication_ms == pytest.approx(0.12)
    assert found.gpu_busy is None
    assert found.parts_ms == pytest.approx(
        {
            "data": 0.1,
            "lookup": 0.11,
            "exchange": 0.09,
            "attention": 0.2,
            "backward: attention": 0.15,
            "backward": 0.15,
            "other": 0.2,
        }
    )


def test_each_moment_of_a_gpu_counts_once() -> None:
    of_backward = "autograd::engine::evaluate_function: "
    events = [
        mark("ProfilerStep#5", 0, 1000),
        mark("data", 0, 200),
        mark("experts", 200, 300),
        event("cpu_op", "aten::mm", 210, 250, **{"Sequence number": 3}),
        event("cuda_runtime", "cudaLaunchKernel", 220, 225, correlation=11),
        event("cuda_driver", "cuLaunchKernel", 260, 265, correlation=12),  # Triton's launches are not operations
        event("kernel", "gemm", 230, 400, thread=7, correlation=11),
        event("kernel", "silu_kernel", 400, 450, thread=7, correlation=12),
        mark("backward", 300, 900),
        event("cpu_op", f"{of_backward}MmBackward0", 460, 700, thread=2, **{"Sequence number": 3, "Fwd thread id": 1}),
        event("cuda_runtime", "cudaLaunchKernel", 480, 490, thread=2, correlation=13),
        event("kernel", "gemm", 500, 600, thread=7, correlation=13),
        event("kernel", "ncclDevKernel_AllReduce", 550, 700, thread=8, correlation=14),
    ]
    found = Trace(events).time_by_part()
    assert found.communication_ms == pytest.approx(0.15)
    assert found.gpu_busy == pytest.approx(0.42)
    assert found.parts_ms == pytest.approx(
        {
            "data": 0.2,  # the GPU waits for the host, which waits for data
            "experts": 0.03 + 0.17 + 0.05,
            "backward: experts": 0.04 + 0.1,  # launched and awaited by autograd's thread
            "exchange": 0.1,  # the other half is hidden behind a product
            "backward": 0.01 + 0.2,
            "other": 0.1,
        }
    )


def test_percentages_add_up() -> None:
    thirds = [mark("ProfilerStep#1", 0, 3), mark("data", 0, 1), mark("loss", 1, 2), mark("lookup", 2, 3)]
    percent = Trace(thirds).time_by_part().percent()
    assert sum(percent.values()) == pytest.approx(100)
    assert sorted(percent.values()) == [33.3, 33.3, 33.4]


def test_the_peak_memory() -> None:
    def memory(at: float, num_bytes: int, address: int) -> dict[str, Any]:
        args = {"Bytes": num_bytes, "Addr": address, "Device Type": 0}
        return {"ph": "i", "name": "[memory]", "ts": at, "tid": 1, "args": args}

    events = [
        mark("ProfilerStep#1", 0, 100),
        mark("attention", 0, 40),
        event("cpu_op", "aten::mm", 10, 20),
        memory(5, -1000, 99),  # older than the profile
        memory(11, 64, 1),
        memory(12, 100, 2),
        memory(30, -100, 2),
        memory(50, 90, 3),
        memory(60, 20, 1 << 40),
        memory(70, -64, 1),
        memory(80, 40, 2),
    ]
    found = Trace(events).peak_memory()
    assert [tuple(row) for row in found] == [("other", "other", 110, 2), ("attention", "aten::mm", 64, 1)]


def test_backward_of_real_operations_has_the_part_of_their_forward(tmp_path: Path) -> None:
    """Also custom functions and blocks that backward recomputes."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return grad * 2

    @region("experts")
    def experts(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ x)

    x = torch.randn(32, 32, requires_grad=True)
    profile = StepProfile(2, 2, tmp_path / "profile", 0, torch.device("cpu"), lambda _: None)
    for _ in profile.each(each_in_region("data", range(7))):
        with region("attention"):
            y = Twice.apply(x)
        y = torch.utils.checkpoint.checkpoint(experts, y, use_reentrant=False)
        with region("backward"):
            y.sum().backward()
    result = profile.result
    assert result is not None and result.steps == 2
    parts = result.parts_ms
    assert set(parts) <= {
        "data",
        "attention",
        "experts",
        "backward",
        "backward: attention",
        "backward: experts",
        "other",
    }
    assert parts["backward: attention"] >= 10
    assert parts["backward: experts"] > 0
    assert sum(parts.values()) == pytest.approx(result.step_ms)
    with pytest.raises(ValueError, match="no step was profiled"):
        Trace([])


def test_every_operation_of_the_decoder_is_in_a_region(tmp_path: Path) -> None:
    """The input views are part of the lookup, forward and backward; all regions of a step add up to the step."""
    options = ["model.num_tables=2", "model.embedding_dim=32", "model.event_features=[a]", "model.user_features=[b]"]
    config = load_config(None, ["data.path=unused", "data.max_seq_len=9", "model.moe.num_experts=4", *options])
    decoder = Decoder(config).train()
    rows = torch.randn(12, 2, 16, requires_grad=True)
    item_index, events, users = torch.arange(8), torch.full((8, 1), 9), torch.full((3, 1), 10)
    seq_offsets, timestamps, keys = torch.tensor([0, 3, 3, 8]), torch.arange(11), torch.arange(3)
    profile = StepProfile(2, 2, tmp_path, 0, torch.device("cpu"), lambda _: None)
    for _ in profile.each(range(5)):
        output = decoder(rows, item_index, seq_offsets, timestamps, events, users, keys)
        with region("loss"):
            loss = output.hidden.square().sum()
        with region("backward"):
            loss.backward()
    trace = Trace.read(tmp_path / "trace_rank_0.json.gz")
    spans = [span for of_thread in trace.host.values() for span in of_thread if span.computes]
    assert {span.part for span in spans if span.name in ("aten::embedding", "aten::index_select")} >= {"lookup"}
    assert {span.name for span in spans if span.part == "other"} == set()
    found = trace.time_by_part()
    assert sum(found.parts_ms.values()) == pytest.approx(found.step_ms)
    for part in ("lookup", "attention", "routing", "experts", "loss"):
        assert found.parts_ms[part] > 0 and found.parts_ms[f"backward: {part}"] > 0


def test_a_missing_rank_is_rejected() -> None:
    config = load_config(None, ["data.path=unused", "train.profile=2", "train.profile_ranks=[0,2]"])
    validate_world_size(config, 3)
    with pytest.raises(UserError, match=r"train.profile_ranks names rank 2: expected 0 to 1"):
        validate_world_size(config, 2)


@pytest.mark.slow
def test_profiling_does_not_change_losses(tmp_path: Path) -> None:
    data, plain, profiled = tmp_path / "data", tmp_path / "plain", tmp_path / "profiled"
    prepare_synthetic("quickstart", data, users=100, items=120, seed=3)
    wanted = ["train.profile=2", "train.profile_start=2", "train.profile_ranks=[1]", "train.checkpoint_every=4"]
    assert train(data, plain, "train.steps=6", processes=2).returncode == 0
    done = train(data, profiled, "train.steps=6", *wanted, processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(profiled) == losses(plain)
    assert len(losses(plain)) == 6
    files = sorted(path.name for path in (profiled / "profile").iterdir())
    assert files == ["parts_rank_1.json", "parts_rank_1.txt", "trace_rank_1.json.gz"]
    record = json.loads((profiled / "profile" / "parts_rank_1.json").read_text())
    percent = record["percent"]
    assert sum(percent.values()) == pytest.approx(100)
    assert sum(record["parts_ms"].values()) == pytest.approx(record["step_ms"])
    assert set(REGIONS) <= set(percent)  # step 4 ends an epoch: an evaluation and a checkpoint
    by_part = {f"backward: {name}" for name in ("lookup", "attention", "routing", "experts", "loss")}
    assert set(percent) - set(REGIONS) == {*by_part, "other"}
    assert percent["other"] < 20
    assert record["allocated_bytes"] > 0
    refused = train(data, tmp_path / "refused", "train.steps=6", "train.profile=3", "train.profile_start=4")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        "error: train.profile_start (4) + train.profile (3) must not exceed"
    )
