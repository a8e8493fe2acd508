"""The stages of the suite. `python -m benchmarks.gpu_suite.stages STAGE FOLDER RUN gpu|dry` runs one of them.

A stage is a function of `Stage` that measures figures one by one and records each. Legend: N longest history, T tokens.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention, elementwise, expert_ffn, sampled_softmax
from benchmarks.gpu_suite import correctness, yardsticks
from benchmarks.gpu_suite.results import Recorder
from benchmarks.kernel_times import kernel_times
from benchmarks.roofline import matrix_rate, memory_rate, timed
from kernels import plan_attention, relative_attention

GROUPS_AND_WIDTHS = ((1, 64), (2, 128), (4, 16))
# Multiply-adds of each attention kernel per pair and group, over the width (dqk = dv); see docs/kernels.md.
PRODUCTS = {
    "semantic_forward_kernel": 2,
    "bias_forward_kernel": 2,
    "semantic_query_kernel": 3,
    "semantic_key_kernel": 4,
    "bias_value_kernel": 2,
    "time_gradient_kernel": 1,
    "position_gradient_kernel": 1,
}
PACKAGES = ("torch", "triton", "torchrec", "fbgemm-gpu", "deepspeed", "pyarrow", "numpy")
CLOCKS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,ecc.mode.current"
)


@dataclass(frozen=True)
class Stage:
    """The device and the sizes of a stage's measurements, which are small in a dry run.

    Attributes:
        seconds: time spent on each figure.
        longest: N of the middle length.
        tokens: tokens of a batch.
    """

    recorder: Recorder
    folder: Path
    dry: bool
    device: torch.device
    dtype: torch.dtype
    seconds: float
    longest: int
    tokens: int

    @classmethod
    def begin(cls, name: str, folder: Path, run: int, dry: bool) -> Stage:
        recorder = Recorder(folder, run, name)
        if dry:
            # Triton's interpreter cannot multiply bfloat16.
            return cls(recorder, folder, dry, torch.device("cpu"), torch.float32, 0.0, 40, 40)
        torch.set_float32_matmul_precision("high")
        return cls(recorder, folder, dry, torch.device("cuda"), torch.bfloat16, 0.15, 2048, 65536)

    @property
    def backend(self) -> str:
        return "triton"

    def peak(self) -> float | None:
        """TFLOP/s of matrix products, as the stage `rates` has measured them; None if it has not."""
        return self.recorder.recorded("rates", f"matrix product, {_name(self.dtype)}").get("tflops")


def environment(stage: Stage) -> None:
    def versions() -> dict[str, Any]:
        found: dict[str, str | None] = {}
        for package in PACKAGES:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = None
        return {"python": sys.version.split()[0], "cpus": os.cpu_count(), "cuda": torch.version.cuda, "packages": found}

    def gpu() -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(stage.device)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        return {name: getattr(properties, name, None) for name in names}

    def clocks() -> dict[str, Any]:
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        return dict(zip(CLOCKS.split(","), values, strict=True))

    stage.recorder.figure("versions", versions)
    if not stage.dry:
        stage.recorder.figure("gpu", gpu)
        stage.recorder.figure("clocks", clocks)


def compile_kernels(stage: Stage) -> None:
    """Compiles the kernels of the next stages into Triton's cache; without a GPU, two kernels for an H100."""
    from benchmarks.gpu_suite import training
    from benchmarks.gpu_suite.variants import variants
    from kernels.backend import compute_capability
    from kernels.compilation import fill_cache

    arch, workers = compute_capability(stage.device), os.cpu_count() or 1
    for name, found in variants(arch, training.config(stage.dry), stage.dry).items():
        fill = functools.partial(fill_cache, found, arch, workers)
        stage.recorder.figure(name, functools.partial(_numbered, "kernels", fill))


def rates(stage: Stage) -> None:
    dtypes = (torch.float32,) if stage.dry else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        measure = functools.partial(matrix_rate, stage.device, dtype, 4 * stage.seconds)
        stage.recorder.figure(f"matrix product, {_name(dtype)}", functools.partial(_numbered, "tflops", measure))
    measure = functools.partial(memory_rate, stage.device, 4 * stage.seconds)
    stage.recorder.figure("copy", functools.partial(_numbered, "gb_per_s", measure))
    for groups, width in GROUPS_AND_WIDTHS:
        yardstick = functools.partial(yardsticks.dot_product_attention, stage, groups, width)
        stage.recorder.rows(f"scaled_dot_product_attention, {groups}x{width}", yardstick)


def check(stage: Stage) -> None:
    for name, compare in correctness.comparisons(stage.dtype, stage.device, stage.dry):
        stage.recorder.figure(name, compare)


def attention_kernels(stage: Stage) -> None:
    for groups, width in GROUPS_AND_WIDTHS:
        _attention(stage, attention.Shape(stage.longest, groups, width, stage.tokens, skewed=False), alone=True)


def lengths(stage: Stage) -> None:
    short, long = (10, 80) if stage.dry else (512, 8192)
    for longest, skewed in ((short, False), (long, False), (stage.longest, True)):
        for groups, width in GROUPS_AND_WIDTHS[::2]:
            _attention(stage, attention.Shape(longest, groups, width, stage.tokens, skewed), alone=False)


def _attention(stage: Stage, shape: attention.Shape, alone: bool) -> None:
    """Measures plan, forward and backward of one shape and, with ``alone``, also each kernel separately."""
    name = f"{shape.groups}x{shape.width}, N={shape.longest}{', skewed' if shape.skewed else ''}"
    prepared = functools.cache(lambda: _prepare(stage, shape))

    def passes() -> Iterator[dict[str, Any]]:
        batch, forward, backward = prepared()
        make_plan = functools.partial(plan_attention, batch.operands[3], shape.longest, batch.operands[5])
        yield {"pass": "plan", **timed(lambda: make_plan(backend=stage.backend), stage.device, stage.seconds)}
        for direction, run, products in (("forward", forward, 4), ("backward", backward, 8)):
            gflop = 2e-9 * batch.pairs * shape.groups * shape.width * products
            yield batch.described | {"pass": direction, **_rate(stage, timed(run, stage.device, stage.seconds), gflop)}

    def kernels_alone() -> Iterator[dict[str, Any]]:
        batch, forward, backward = prepared()
        found = kernel_times(lambda: (forward(), backward()), stage.device, 1 if stage.dry else 9)
        for kernel, milliseconds in found.items():
            gflop = 2e-9 * batch.pairs * shape.groups * shape.width * PRODUCTS.get(kernel, 0)
            yield {"kernel": kernel, **_rate(stage, {"ms": milliseconds}, gflop)}

    stage.recorder.rows(name, lambda: list(passes()))
    if alone:
        stage.recorder.rows(f"{name}, kernels alone", lambda: list(kernels_alone()))


def _prepare(
    stage: Stage, shape: attention.Shape
) -> tuple[attention.Batch, Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    batch = attention.Batch.random(shape, stage.dtype, stage.device)
    plan = plan_attention(batch.operands[3], shape.longest, batch.operands[5], backend=stage.backend)
    forward = functools.partial(relative_attention, *batch.operands, backend=stage.backend, plan=plan)
    y = forward()
    differentiate = functools.partial(torch.autograd.grad, y, batch.inputs, torch.randn_like(y), retain_graph=True)
    return batch, forward, differentiate


def _rate(stage: Stage, figures: dict[str, float], gflop: float) -> dict[str, Any]:
    peak = stage.peak()
    if not gflop:
        return dict(figures)
    tflops = gflop / figures["ms"]
    return {**figures, "gflop": gflop, "tflops": tflops, "of_peak": tflops / peak if peak else None}


def train(stage: Stage) -> None:
    from benchmarks.gpu_suite import training

    stage.recorder.figure("decoder step", functools.partial(training.decoder_step, stage))
    stage.recorder.rows("decoder step, kernels alone", functools.partial(training.decoder_kernels, stage))
    stage.recorder.figure("training", functools.partial(training.training, stage))


def experts(stage: Stage) -> None:
    """Compares experts with three calls of torch._grouped_mm, and measures the whole mixture with and without copies."""
    shapes = ((8, 16, 2),) if stage.dry else ((64, 256, 8), (128, 512, 8), (256, 1024, 8), (64, 256, 64))
    rows = 8 if stage.dry else 131072
    for dim, hidden_dim, num_experts in shapes:
        for skewed in (False, True) if (dim, num_experts) == (64, 8) else (False,):
            name = f"{dim}x{hidden_dim}, {num_experts} experts{', skewed' if skewed else ''}"
            shape = rows, num_experts, dim, hidden_dim, skewed
            stage.recorder.rows(name, functools.partial(expert_ffn.measure, *shape, *_where(stage)))


def softmax(stage: Stage) -> None:
    tokens, items, width = (10, 12, 8) if stage.dry else (65536, 20000, 64)
    for group_size, count in ((64, 128), (1, 128), (0, 512)):
        count = 6 if stage.dry else count
        shape = tokens, group_size, count, width, items
        name = f"{group_size or 'all'} tokens share {count} negatives"
        stage.recorder.rows(name, functools.partial(sampled_softmax.measure, *shape, *_where(stage)))


def norms(stage: Stage) -> None:
    rows, widths = (16, (8,)) if stage.dry else (262144, (64, 192))
    for width in widths:
        measure = functools.partial(elementwise.measure_norms, rows, width, *_where(stage))
        stage.recorder.rows(f"norms, width {width}", measure)
    measure = functools.partial(elementwise.measure_silu_split, rows, widths[0], *_where(stage))
    stage.recorder.rows(f"split SiLU, width {widths[0]}", measure)


def padded(stage: Stage) -> None:
    """Compares with the eager padded form of the public code, at one shape."""
    shape = attention.Shape(stage.longest, 1, 8 if stage.dry else 64, stage.tokens // (1 if stage.dry else 4), False)
    measure = functools.partial(attention.measure, shape, *_where(stage), compiled=False)
    stage.recorder.rows(f"1x{shape.width}, N={shape.longest}", measure)


def flex(stage: Stage) -> None:
    stage.recorder.rows("flex_attention, 1x64", functools.partial(yardsticks.flex_attention, stage, 1, 64))


def _where(stage: Stage) -> tuple[torch.dtype, torch.device, float]:
    return stage.dtype, stage.device, stage.seconds


def _numbered(name: str, measure: Callable[[], float]) -> dict[str, float]:
    return {name: measure()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


RUN = {
    "environment": environment,
    "compile": compile_kernels,
    "rates": rates,
    "correctness": check,
    "attention": attention_kernels,
    "training": train,
    "lengths": lengths,
    "experts": experts,
    "softmax": softmax,
    "elementwise": norms,
    "padded": padded,
    "flex": flex,
}


def main(name: str, folder: str, run: str, kind: str) -> int:
    """Runs one stage and returns its exit status, 1 if a figure could not be measured."""
    stage = Stage.begin(name, Path(folder), int(run), dry=kind == "dry")
    RUN[name](stage)
    return int(stage.recorder.failures > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
