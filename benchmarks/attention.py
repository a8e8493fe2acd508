"""How fast is relative attention, by length and width, forward and backward, compared with the eager padded form?

    python -m benchmarks.attention                                    # default shapes for this device
    python -m benchmarks.attention --lengths 256,1024 --widths 4x16 --skewed --json out.json

The forms are `torch` and `triton`, which are ours, and `padded`, which computes as the public FuXi-α code: q, k, v padded to
(B, N), weights of (B, N, N) for each channel. `padded` is also measured under torch.compile. On a GPU, installed public HSTU
kernels are measured too; they compute only the semantic channel.

FLOPs are counted over true lengths: 2 per multiply-add, L(L + 1)/2 pairs per sequence, G·(dqk + 3·dv) multiply-adds per pair in
forward and G·(3·dqk + 5·dv) in backward, for S, g_A vᵀ, dq, dk, dP, dT and three products of dv. One channel has dqk + dv and
3·dqk + 2·dv. So padding, work above the diagonal and recomputation do not count. The roofline is the matrix rate measured in the
same run. "step GiB" is the peak of forward and backward together.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.agreement import check_same
from benchmarks.roofline import (
    JsonPath,
    Seconds,
    backends,
    device_and_dtype,
    matrix_rate,
    publish,
    run_header,
    step_memory,
    timed,
)
from kernels import plan_attention, relative_attention
from kernels.relative_attention.reference import time_bucket

# The padded form is skipped if its three weights, which backward needs, exceed this.
MEMORY_LIMIT_BYTES = {"cuda": 24 << 30, "cpu": 2 << 30}


def main(
    lengths: Annotated[str, typer.Option(help="longest lengths, such as 128,256")] = "",
    widths: Annotated[str, typer.Option(help="GROUPSxWIDTH, such as 1x50,4x16")] = "",
    tokens: Annotated[int, typer.Option(help="tokens of a batch; 0: 65536 on a GPU, 8192 on a CPU")] = 0,
    skewed: Annotated[bool, typer.Option(help="one sequence of full length, all others a tenth of it")] = False,
    compiled: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="time torch.compile of the padded form; on a GPU by default"),
    ] = None,
    seconds: Seconds = 0.5,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of times and, with --json, writes them."""
    device, dtype = device_and_dtype()
    on_gpu = device.type == "cuda"
    tokens = tokens or (65536 if on_gpu else 8192)
    asked_lengths = [
        int(x) for x in (lengths or ("128,256,512,1024,2048,4096,8192" if on_gpu else "64,200,512")).split(",")
    ]
    asked_widths = [x.split("x") for x in (widths or ("1x64,4x16,4x64,2x128" if on_gpu else "1x50,4x16")).split(",")]
    peak = matrix_rate(device, dtype, seconds)
    rows = []
    for longest in asked_lengths:
        for groups, width in asked_widths:
            shape = Shape(longest, int(groups), int(width), tokens, skewed)
            rows += measure(shape, dtype, device, seconds, on_gpu if compiled is None else compiled)
    for row in rows:
        row["roofline_share"] = row["gflop"] / row["ms"] / peak if row["gflop"] else None
    report(rows, device, dtype, peak, json_path)


@dataclass(frozen=True)
class Shape:
    """A shape to measure: ``tokens`` in sequences of up to ``longest``, ``groups`` of ``width`` columns."""

    longest: int
    groups: int
    width: int
    tokens: int
    skewed: bool

    def lengths(self, random: torch.Generator) -> Tensor:
        """The lengths of the sequences: from 0.65 to 1 times the longest or, if skewed, one of it and the others a tenth."""
        if self.skewed:
            dwarfs = max(1, 10 * (self.tokens - self.longest) // self.longest)
            return torch.tensor([self.longest] + [max(1, self.longest // 10)] * dwarfs)
        count = max(1, self.tokens // self.longest)
        return torch.randint(int(0.65 * self.longest), self.longest + 1, (count,), generator=random)


@dataclass(frozen=True)
class Batch:
    """Random operands of one shape, with times that step by seconds to months; ``pairs`` is Σ L(L + 1)/2."""

    sizes: Tensor
    pairs: float
    operands: tuple[Any, ...]
    described: dict[str, Any]

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Batch:
        random = torch.Generator().manual_seed(shape.longest)
        sizes, longest, groups, width = shape.lengths(random), shape.longest, shape.groups, shape.width
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(device)
        num_tokens = int(offsets[-1])
        steps = torch.exp(13 * torch.rand(num_tokens + len(sizes), generator=random)).long()
        timestamps = (1_500_000_000 + steps.cumsum(0)).to(device)

        def normal(*shape: int) -> Tensor:
            return (0.3 * torch.randn(*shape, generator=random)).to(device, dtype).requires_grad_()

        q, k, v = (normal(groups, num_tokens, width) for _ in range(3))
        operands = (q, k, v, offsets, longest, timestamps, normal(129), normal(2 * longest - 1))
        described = {
            "longest": longest,
            "sequences": len(sizes),
            "tokens": num_tokens,
            "groups": groups,
            "width": width,
        }
        return cls(sizes, (sizes.double() * (sizes + 1) / 2).sum().item(), operands, described)

    @property
    def inputs(self) -> list[Tensor]:
        """The operands that are differentiated: q, k, v and both weights."""
        return [operand for operand in self.operands if isinstance(operand, Tensor) and operand.requires_grad]


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float, compiled: bool
) -> list[dict[str, Any]]:
    """Forward and backward of every form that fits, for one shape."""
    batch = Batch.random(shape, dtype, device)
    operands, inputs, described = batch.operands, batch.inputs, batch.described
    q, k, v, offsets, longest, timestamps, *_ = operands
    sizes, pairs, groups, width = batch.sizes, batch.pairs, shape.groups, shape.width
    rows: list[dict[str, Any]] = []
    forms: dict[str, Callable[[], Tensor]] = {}
    for backend in ["triton"] if device.type == "cuda" else backends(device):
        make_plan = functools.partial(plan_attention, offsets, longest, timestamps, backend=backend)
        forms[backend] = functools.partial(relative_attention, *operands, backend=backend, plan=make_plan())
        planned = timed(make_plan, device, seconds)
        rows.append(described | {"form": f"plan, {backend}", "pass": "once per batch", "gflop": None} | planned)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if 3 * len(sizes) * (groups + 1) * longest**2 * q.element_size() <= MEMORY_LIMIT_BYTES[device.type]:
        padded = functools.partial(padded_attention, *operands)
        for name, form in forms.items():
            check_agreement(name, form, padded, inputs, tolerance)
        forms["padded"] = padded
        if compiled:
            torch._dynamo.reset()  # Dynamo compiles a function for a limited number of shapes, then runs it eagerly
            forms["padded, compiled"] = functools.partial(torch.compile(padded_attention, dynamic=False), *operands)
    by_form = {name: (form, inputs, {"forward": 4 * width, "backward": 8 * width}) for name, form in forms.items()}
    ours = next(iter(forms.values()))
    for name, form, given in public_forms(q, k, v, offsets, longest):
        with torch.no_grad():
            wanted = ours().unflatten(2, (3, width))[:, :, 2].transpose(0, 1)
            check_same(f"the {name} form", form(), wanted, tolerance)
        by_form[name] = form, given, {"forward": 2 * width, "backward": 5 * width}
    for name, (form, given, products) in by_form.items():
        with torch.no_grad():
            times = {"forward": timed(form, device, seconds)}
        y = form()
        differentiate = functools.partial(torch.autograd.grad, y, given, torch.randn_like(y), retain_graph=True)
        times["backward"] = timed(differentiate, device, seconds)
        for direction, figures in times.items():
            counted = {"form": name, "pass": direction, "gflop": 2e-9 * pairs * groups * products[direction]}
            rows.append(described | counted | figures)
        del y, differentiate
        rows[-1]["step_mem_gib"] = step_memory(form, given, device)
    return rows


def public_forms(
    q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, max_seq_len: int
) -> Iterator[tuple[str, Callable[[], Tensor], list[Tensor]]]:
    """The public HSTU kernels that are installed: name, call → (T, G, dv), and the inputs that it differentiates.

    They take (T, heads, width) and compute causal SiLU(q kᵀ) / N · v, which is the semantic channel.
    """
    given = [x.detach().transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    if importlib.util.find_spec("generative_recommenders"):
        common = importlib.import_module("generative_recommenders.common")
        operation = importlib.import_module("generative_recommenders.ops.hstu_attention")
        triton_kernel = common.HammerKernel.TRITON
        yield (
            "generative-recommenders",
            functools.partial(operation.hstu_mha, max_seq_len, 1.0, *given, seq_offsets, kernel=triton_kernel),
            given,
        )
    if importlib.util.find_spec("hstu_attn"):
        attend = importlib.import_module("hstu_attn").hstu_attn_varlen_func
        bounds = [seq_offsets.int()] * 2
        yield (
            "hstu_attn",
            functools.partial(attend, *given, *bounds, max_seq_len, max_seq_len, window_size=(-1, 0)),
            given,
        )


def check_agreement(
    name: str, form: Callable[[], Tensor], expected: Callable[[], Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    """Raises if a form computes something else, forward or backward, so that only right forms are measured."""
    upstream = torch.randn_like(expected())
    results = ([y.detach(), *torch.autograd.grad(y, inputs, upstream)] for y in (form(), expected()))
    for found, reference in zip(*results, strict=True):
        check_same(f"the {name} form", found, reference, tolerance)


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    timestamps: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
) -> Tensor:
    """`kernels.relative_attention` as the public code computes it, with everything padded to (B, N) and (B, N, N)."""
    lengths = seq_offsets.diff()
    position = torch.arange(max_seq_len, device=q.device)
    real = position < lengths[:, None]
    token = torch.where(real, seq_offsets[:-1, None] + position, 0)
    sequence = torch.arange(len(lengths), device=q.device)[:, None]
    times, next_times = timestamps[token + sequence], timestamps[token + sequence + 1]
    causal = (position[:, None] >= position[None, :]) & real[:, None, :]
    padded_q, padded_k, padded_v = (x[:, token] * real[..., None] for x in (q, k, v))  # (G, B, N, width)
    semantic = F.silu(padded_q @ padded_k.transpose(2, 3)) / max_seq_len * causal
    temporal = ts_weights[time_bucket(next_times[:, :, None] - times[:, None, :])] * causal
    positional = pos_weights[position[None, :] - position[:, None] + max_seq_len - 1] * causal
    out = torch.cat([weights @ padded_v for weights in (positional, temporal, semantic)], dim=3)
    return out[:, real]


def report(
    rows: list[dict[str, Any]], device: torch.device, dtype: torch.dtype, peak: float, path: Path | None
) -> None:
    cells = [
        (str(row["longest"]), str(row["sequences"]), f"{row['groups']} × {row['width']}", row["form"], row["pass"])
        + (f"{row['ms']:.2f}", f"{row['spread_ms']:.2f}")
        + ((f"{row['gflop']:.2f}", f"{row['roofline_share']:.0%}") if row["gflop"] else ("", ""))
        + (f"{row['step_mem_gib']:.3f}" if "step_mem_gib" in row else "",)
        for row in rows
    ]
    columns = ("longest", "sequences", "groups × width", "form", "pass", "ms", "± ms", "GFLOP", "of peak", "step GiB")
    publish("Relative attention", run_header(device, dtype, matrix_tflops=peak), columns, cells, rows, path)


if __name__ == "__main__":
    typer.run(main)
