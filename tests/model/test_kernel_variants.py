"""The kernels that are compiled before training are those that a step launches, no more and no fewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mme.config import load_config
from mme.model.kernel_variants import compile_training_kernels, training_variants

pytest.importorskip("triton")

FUXI_ALPHA = ["model.num_tables=1", "model.embedding_dim=50", "model.moe.num_experts=0", "model.dropout=0"]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="Fuxi-MME"),
        pytest.param([*FUXI_ALPHA, "loss.negatives=shared", "loss.log_q_correction=true"], id="FuXi-α"),
        pytest.param(
            ["model.embedding_dim=512", "model.num_tables=2", "model.num_heads=2", "loss.negatives=shared"],
            id="wide views",
        ),
        pytest.param(
            [
                "model.moe.placement=[1]",
                "model.moe.capacity_factor=1.0",
                "model.score_norm=per_view",
                "loss.views=both",
            ],
            id="one block with experts",
        ),
        pytest.param(["train.precision=float32", "loss.negatives=shared", "loss.negative_group_size=0"], id="float32"),
        pytest.param(["model.block=hstu", "model.moe.num_experts=0"], id="HSTU"),
    ],
)
@pytest.mark.slow
def test_a_step_launches_what_was_compiled(overrides: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.model.step_launches", *overrides]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["launched"]) == set(found["compiled"])
    assert len(found["launched"]) >= 4


def test_experts_on_several_ranks_are_those_of_one_rank_without_routing() -> None:
    config = load_config(None, ["data.path=unused", "model.moe.num_experts=32"])
    alone, shared = (
        {variant.name: variant.constants for variant in training_variants(config, 90, processes)}
        for processes in (1, 8)
    )
    assert alone["bf16 d=16 top_k=2"]["EXPERTS"] == 32
    assert shared["bf16 d=16 top_k=0"]["EXPERTS"] == 4 and "bf16 d=16 top_k=2" not in shared


def test_nothing_is_compiled_without_a_gpu() -> None:
    config = load_config(None, ["data.path=unused"])
    assert compile_training_kernels(config, torch.device("cpu"), 1) == ""
