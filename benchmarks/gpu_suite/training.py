"""Whole training steps of Fuxi-MME: decoder and loss in this process, and the job with its tables in another."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.kernel_times import kernel_times
from benchmarks.roofline import timed
from benchmarks.step_memory import NUM_ITEMS, full_batch, kernel_step
from mme.config import Config, load_config
from mme.flops import training_flops
from mme.model.decoder import Decoder
from mme.prepare.writer import DatasetWriter

if TYPE_CHECKING:
    from benchmarks.gpu_suite.stages import Stage

ITEMS = 20_000
# Figures of `benchmarks.train_throughput` that the results keep.
KEPT = (
    "tokens_per_s", "tokens_per_s_all", "waiting_share", "gflops_per_s", "matrix_gflops_per_s", "model_flops_utilisation",
    "peak_mem_gib", "exposed_communication_share", "checkpoint",
)  # fmt: skip


def overrides(dry: bool) -> list[str]:
    """Four views of 256 in heads of 64, with a total width of 1024; tiny in a dry run."""
    model = [
        "model.num_tables=4",
        "model.moe.num_experts=8",
        "model.moe.placement=[]",
        "model.dropout=0.1",
        "loss.negatives=shared",
    ]
    if dry:
        sizes = ["model.embedding_dim=16", "model.num_blocks=1", "data.max_seq_len=12", "data.batch_size=2"]
    else:
        # Each view has its own softmax, 256 wide, because the loss has no Triton kernel for widths above 512.
        sizes = ["model.embedding_dim=1024", "model.num_heads=4", "model.num_blocks=4", "model.score_norm=per_view"]
        sizes += ["loss.views=each", "data.max_seq_len=2048", "data.batch_size=16"]
    return [*model, *sizes, "data.path=unused", "train.precision=" + ("float32" if dry else "bfloat16")]


def config(dry: bool) -> Config:
    return load_config(None, overrides(dry))


def decoder_step(stage: Stage) -> dict[str, Any]:
    """Forward, loss, backward and AdamW without TorchRec's tables and without DeepSpeed, to show what the kernels permit."""
    settings = config(stage.dry)
    run, tokens, flops = _decoder_step(stage, settings)
    found = timed(run, stage.device, 4 * stage.seconds)
    peak, tflops = stage.peak(), 1e-9 * flops / found["ms"]
    rates = {"tokens_per_s": 1e3 * tokens / found["ms"], "tflops": tflops}
    return found | rates | {"model_flops_utilisation": tflops / peak if peak else None, "tokens": tokens}


def decoder_kernels(stage: Stage) -> list[dict[str, Any]]:
    """The time of each Triton kernel of the decoder step, summed over its launches."""
    run, *_ = _decoder_step(stage, config(stage.dry))
    found = kernel_times(run, stage.device, 1 if stage.dry else 5)
    return [{"kernel": name, "ms": milliseconds} for name, milliseconds in found.items()]


def _decoder_step(stage: Stage, settings: Config) -> tuple[Callable[[], None], int, float]:
    """A step, the number of its tokens, and its FLOPs."""
    longest, sequences = settings.data.max_seq_len, settings.data.batch_size
    if stage.dry:
        settings.kernels.backend = "triton"
    decoder = Decoder(settings).to(stage.device).train()
    batch = full_batch(longest, sequences).to(stage.device)
    loss = kernel_step(settings, batch, stage.device, decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    pairs = sequences * longest * (longest + 1) // 2
    counted = training_flops(settings, batch.num_tokens, pairs, NUM_ITEMS)
    return step, batch.num_tokens, float(sum(counted.values()))


def training(stage: Stage) -> dict[str, Any]:
    """Runs `benchmarks.train_throughput` in one process on histories of random items, including its time by region."""
    data, result = stage.folder / "random_histories", stage.folder / "train_throughput.json"
    write_histories(data, config(stage.dry).data.max_seq_len, 40 if stage.dry else 400)
    steps = ["--steps", "2", "--repetitions", "2", "--profiled-steps", "1"] if stage.dry else ["--steps", "8"]
    command = [sys.executable, "-m", "benchmarks.train_throughput", "--processes", "1", "--padded-steps", "0", *steps]
    settings = [x for x in overrides(stage.dry) if not x.startswith("data.path")]
    settings += ["train.table_optimizer=rowwise_adagrad"]
    done = subprocess.run(
        [*command, "--json", str(result), "--data", str(data), *settings], text=True, capture_output=True
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(
            next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
        )
    found = json.loads(result.read_text())
    return {name: found[name] for name in KEPT if name in found} | {"percent": found["profile"]["percent"]}


@functools.cache
def write_histories(path: Path, longest: int, users: int) -> None:
    """Writes a training set: histories of 0.65 to 1.2 times the longest, with random items that are minutes to days apart."""
    if path.exists():
        return
    random = np.random.default_rng(0)
    lengths = random.integers(int(0.65 * longest), int(1.2 * longest), users)
    offsets = np.concatenate([[0], lengths.cumsum()])
    items = random.integers(ITEMS, size=offsets[-1])
    times = 1_500_000_000 + np.exp(random.uniform(4, 12, offsets[-1])).astype(np.int64).cumsum()
    with DatasetWriter(path) as writer:
        writer.add(pa.array(np.arange(users)), offsets, items, times)
        info = {"name": "random", "sort_rule": "by time, in the order generated", "source": {"generator": "random"}}
        writer.finish(info, pa.array(np.arange(ITEMS)), np.bincount(items, minlength=ITEMS))
