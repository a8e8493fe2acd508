"""How fast is relative attention, by length and width, forward and backward, against the eager padded form?

    python -m benchmarks.attention                                    # the shapes that this device is asked about
    python -m benchmarks.attention --lengths 256,1024 --widths 4x16 --skewed --json out.json

The padded form is what the public FuXi-α code does: q, k, v padded to (B, N), weights of (B, N, N) for each channel. On a
GPU it is also timed under torch.compile. FLOPs are counted over true lengths: 2 a multiply-add, L(L + 1)/2 pairs a
sequence, G·(dqk + 3·dv) multiply-adds a pair forward and G·(3·dqk + 5·dv) backward: S, g_A vᵀ, dq, dk, dP, dT and three of dv; so padding, work above the
diagonal and recomputation count as none. The roofline is the matrix rate measured in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.roofline import matrix_rate, publish, run_header, timed
from kernels import plan_attention, relative_attention
from kernels.relative_attention.reference import time_bucket

MEMORY_LIMIT_BYTES = 8 << 30  # the padded form is left out where its three weights, kept for backward, pass this


def main(
    lengths: Annotated[str, typer.Option(help="longest lengths, such as 128,256")] = "",
    widths: Annotated[str, typer.Option(help="GROUPSxWIDTH, such as 1x50,4x16")] = "",
    tokens: Annotated[int, typer.Option(help="tokens of a batch; 0: 65536 on a GPU, 8192 on a CPU")] = 0,
    skewed: Annotated[bool, typer.Option(help="one sequence of full length, all others a tenth of it")] = False,
    seconds: Annotated[float, typer.Option(help="time spent on each figure")] = 0.5,
    json_path: Annotated[Optional[Path], typer.Option("--json")] = None,  # noqa: UP045  (typer on Python 3.10)
) -> None:
    """Prints a table of times and, with --json, writes them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokens = tokens or (65536 if on_gpu else 8192)
    asked_lengths = [
        int(x) for x in (lengths or ("128,256,512,1024,2048,4096,8192" if on_gpu else "64,200,512")).split(",")
    ]
    asked_widths = [x.split("x") for x in (widths or ("1x64,4x16,4x64,2x128" if on_gpu else "1x50,4x16")).split(",")]
    peak = matrix_rate(device, dtype, seconds)
    rows = []
    for longest in asked_lengths:
        for groups, width in asked_widths:
            rows += measure(longest, int(groups), int(width), tokens, skewed, dtype, device, seconds)
    for row in rows:
        row["roofline_share"] = row["gflop"] / row["ms"] / peak if row["gflop"] else None
    report(rows, device, dtype, peak, json_path)


def measure(
    longest: int,
    groups: int,
    width: int,
    tokens: int,
    skewed: bool,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """Forward and backward of every form that fits, for one shape."""
    random = torch.Generator().manual_seed(longest)
    sizes = torch.randint(int(0.65 * longest), longest + 1, (max(1, tokens // longest),), generator=random)
    if skewed:
        sizes = torch.cat(
            [sizes.new_tensor([longest]), sizes.new_full((max(1, 10 * tokens // longest - 10),), longest // 10)]
        )
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(device)
    num_tokens = int(offsets[-1])
    steps = torch.exp(13 * torch.rand(num_tokens + len(sizes), generator=random)).long()
    timestamps = (1_500_000_000 + steps.cumsum(0)).to(device)

    def normal(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, generator=random)).to(device, dtype).requires_grad_()

    q, k, v = (normal(groups, num_tokens, width) for _ in range(3))
    ts_weights, pos_weights = normal(129), normal(2 * longest - 1)
    operands = (q, k, v, offsets, longest, timestamps, ts_weights, pos_weights)
    plan = plan_attention(offsets, longest, timestamps)
    forms: dict[str, Callable[[], Tensor]] = {"jagged": lambda: relative_attention(*operands, plan=plan)}
    kept = 3 * len(sizes) * (groups + 1) * longest**2 * q.element_size()
    if kept <= MEMORY_LIMIT_BYTES:
        forms["padded"] = lambda: padded_attention(*operands)
        check_agreement(forms["jagged"], forms["padded"], 1e-5 if dtype == torch.float32 else 2e-2)
        if device.type == "cuda":
            compiled = torch.compile(padded_attention, dynamic=False)
            forms["padded, compiled"] = lambda: compiled(*operands)
    pairs = (sizes.double() * (sizes + 1) / 2).sum().item()
    gflop = {"forward": 2e-9 * pairs * groups * 4 * width, "backward": 2e-9 * pairs * groups * 8 * width}
    shape = {"longest": longest, "sequences": len(sizes), "tokens": num_tokens, "groups": groups, "width": width}
    rows: list[dict[str, Any]] = [
        shape | {"form": "plan", "pass": "once a batch", "gflop": None}
        | timed(lambda: plan_attention(offsets, longest, timestamps), device, seconds)
    ]  # fmt: skip
    for form, attend in forms.items():
        with torch.no_grad():
            forward = timed(attend, device, seconds)
        y = attend()
        inputs = [q, k, v, ts_weights, pos_weights]
        differentiate = functools.partial(torch.autograd.grad, y, inputs, torch.randn_like(y), retain_graph=True)
        backward = timed(differentiate, device, seconds)
        for name, figures in (("forward", forward), ("backward", backward)):
            rows.append(shape | {"form": form, "pass": name, "gflop": gflop[name]} | figures)
    return rows


def check_agreement(found: Callable[[], Tensor], expected: Callable[[], Tensor], tolerance: float) -> None:
    """No time is told of a form that computes something else."""
    with torch.no_grad():
        y, reference = found().double(), expected().double()
    error = ((y - reference).norm() / reference.norm()).item()
    if not error <= tolerance:
        raise RuntimeError(f"the jagged form differs from the padded one by {error:.2e}, more than {tolerance:.0e}")


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
    """`kernels.relative_attention` as the public code computes it: everything padded to (B, N) and (B, N, N)."""
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
        + (f"{row['peak_mem_gib']:.3f}" if "peak_mem_gib" in row else "",)
        for row in rows
    ]
    columns = ("longest", "sequences", "groups × width", "form", "pass", "ms", "± ms", "GFLOP", "of peak", "GiB")
    publish("Relative attention", run_header(device, dtype, matrix_tflops=peak), columns, cells, rows, path)


if __name__ == "__main__":
    typer.run(main)
