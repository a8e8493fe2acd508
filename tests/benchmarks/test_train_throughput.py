"""The padded model of the throughput benchmark computes FuXi-α, and the figures come from the steps that were run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.padded_fuxi import PaddedBlock, PaddedFuxi, gathered_loss
from kernels import sampled_softmax_loss
from mme.config import load_config
from mme.data.balance import attention_equals_rest_at
from mme.data.batch import SequenceBatch
from mme.flops import training_flops
from mme.model.fuxi_block import FuxiBlock
from mme.model.moe import DenseFFN
from mme.prepare.synthetic import prepare_synthetic

LENGTHS, N, DIM, HEADS, HIDDEN = [3, 0, 7, 1], 9, 8, 2, 12


def batch() -> SequenceBatch:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor(LENGTHS)
    tokens, sequences = int(lengths.sum()), len(LENGTHS)
    return SequenceBatch(
        item_ids=torch.randint(20, (tokens,), generator=generator),
        seq_offsets=torch.tensor([0, *lengths.cumsum(0).tolist()]),
        timestamps=torch.randint(10**6, (tokens + sequences,), generator=generator),
        target_ids=torch.randint(20, (tokens,), generator=generator),
        user_rows=torch.arange(sequences),
    )


def test_the_padded_block_is_the_block() -> None:
    torch.manual_seed(0)
    padded = PaddedBlock(DIM, N, HEADS, HIDDEN, dropout=0.0).double()
    block = FuxiBlock(DIM, N, HEADS, DIM // HEADS, DIM // HEADS, DenseFFN(DIM, HIDDEN)).double()
    with torch.no_grad():
        for name in ("uvqk", "ts_weights", "pos_weights"):
            getattr(block, name).copy_(getattr(padded, name).normal_(std=0.3))
        block.output.load_state_dict(padded.output.state_dict())
        for name in ("w1", "w3", "w2"):
            getattr(block.ffn.experts, name).copy_(getattr(padded, name).weight.T[None])
    given = batch()
    x = torch.randn(given.num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    model = PaddedFuxi(load_config(None, ["data.path=unused", f"data.max_seq_len={N}"]), 20)
    inside, times = model.padded(given)
    y = padded(x, times, inside)
    expected = block(x[None], given.seq_offsets, given.timestamps)[0][0]
    torch.testing.assert_close(y, expected)
    weights = [padded.uvqk, padded.ts_weights, padded.pos_weights, padded.output.bias]
    expected_weights = [block.uvqk, block.ts_weights, block.pos_weights, block.output.bias]
    found = torch.autograd.grad(y, [x, *weights], grad)
    for ours, theirs in zip(found, torch.autograd.grad(expected, [x, *expected_weights], grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_gathered_loss_is_the_loss() -> None:
    hidden, items = torch.randn(11, DIM, dtype=torch.float64), torch.randn(20, DIM, dtype=torch.float64)
    targets, negatives = torch.randint(20, (11,)), torch.randint(20, (11, 6))
    normed = [torch.nn.functional.normalize(x, dim=-1, eps=1e-6) for x in (hidden, items)]
    expected = sampled_softmax_loss(*normed, targets, negatives, temperature=0.05)
    torch.testing.assert_close(gathered_loss(hidden, items, targets, negatives, 0.05), expected)


def test_flops_of_the_public_setting() -> None:
    """Counted by hand: 2 blocks of width 50, FFN of width 50, 128 negatives; one sequence of 3 tokens."""
    overrides = ["model.num_tables=1", "model.embedding_dim=50", "model.ffn_multiplier=1", "model.moe.num_experts=0"]
    config = load_config(None, ["data.path=unused", *overrides])
    per_token = {"attention": 2 * (50 * 300 + 150 * 50), "routing": 0, "experts": 2 * 3 * 50 * 50, "loss": 129 * 50}
    per_pair = 2 * (50 + 150)
    expected = {part: 6 * 3 * count for part, count in per_token.items()}
    expected["attention"] += 6 * 6 * per_pair
    assert training_flops(config, num_tokens=3, num_pairs=6, num_items=1000) == expected
    config.loss.views = "both"  # with one view, the same loss twice
    assert training_flops(config, num_tokens=3, num_pairs=6, num_items=1000) == expected | {
        "loss": 2 * expected["loss"]
    }
    assert attention_equals_rest_at(config.model) == (50 * 300 + 150 * 50 + 3 * 50 * 50) // 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--setting", "nope"], "--setting nope: expected one of quickstart, fuxi-alpha"),
        (["train.stepz=3"], "override 'train.stepz=3': train.stepz: unknown key (did you mean train.steps?)"),
    ],
)
def test_wrong_input_is_refused_in_one_line(words: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.train_throughput", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


@pytest.mark.slow
def test_the_benchmark_shows_time_by_part(tmp_path: Path) -> None:
    data, result = tmp_path / "data", tmp_path / "result.json"
    prepare_synthetic("quickstart", data, users=60, items=80, seed=3)
    command = [sys.executable, "-m", "benchmarks.train_throughput", "--data", str(data), "--json", str(result)]
    counts = ["--steps", "2", "--repetitions", "2", "--padded-steps", "1", "--profiled-steps", "2"]
    small = ["data.max_seq_len=16", "data.batch_size=8", "model.embedding_dim=16", "model.moe.num_experts=4"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, *counts, *small], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(result.read_text())
    profile = figures["profile"]
    assert profile["steps"] == 2
    assert sum(profile["parts_ms"].values()) == pytest.approx(profile["step_ms"])
    assert sum(profile["percent"].values()) == pytest.approx(100)
    assert {"data", "lookup", "exchange", "attention", "routing", "experts", "loss", "backward", "optimizer"} <= set(
        profile["parts_ms"]
    )
    assert 0 < figures["model_flops_utilisation"] < 1
    assert 0 < figures["exposed_communication_share"] < 1
    assert len(figures["tokens_per_s_all"]) == len(figures["padded_fuxi_alpha"]["ratio_all"]) == 2
    assert figures["checkpoint"]["complete_after_ms"] >= figures["checkpoint"]["held_up_ms"] > 0
    refused = subprocess.run([*command, "model.widht=3"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "model.widht: unknown key" in refused.stderr
