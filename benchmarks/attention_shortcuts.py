"""Do the two exact shortcuts of relative attention pay on this device at long lengths?

    python -m benchmarks.attention_shortcuts --lengths 512,2048,4096,8192 --json out.json

Measures the forward of one sequence and one group. The temporal channel has two forms. `tiles` looks up the weights of blocks of
queries by their buckets and multiplies them by v, as the PyTorch form of `kernels.relative_attention`, which computes the buckets
once per batch. `segments` needs times that do not step back. Then the keys of bucket b or more are a prefix, so
Σ_j T_ij v_j = Σ_b (w_b − w_{b−1}) · Σ_{j < end_b(i)} v_j, a weighted sum of at most 129 rows of v's prefix sums. The positional
channel has `tiles`, and `convolution` by FFT over 2N. Each form must agree with float64, and its error is printed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.roofline import JsonPath, Seconds, device_and_dtype, publish, run_header, timed
from kernels.relative_attention.reference import NUM_TIME_BUCKETS, time_bucket

BLOCK = 64  # queries at a time, as in the chunks of the PyTorch form
SEGMENT_ROWS = 256  # queries at a time whose prefix rows are looked up


def main(
    lengths: Annotated[str, typer.Option(help="such as 2048,8192")] = "512,2048,4096",
    width: Annotated[int, typer.Option(help="dv")] = 64,
    seconds: Seconds = 0.5,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of times and errors and, with --json, writes them."""
    device, _ = device_and_dtype()
    rows = [row for length in lengths.split(",") for row in measure(int(length), width, device, seconds)]
    cells = [
        (
            str(row["length"]),
            row["operation"],
            row["form"],
            f"{row['ms']:.1f}",
            f"{row['spread_ms']:.1f}",
            f"{row['times_faster']:.2f}",
            f"{row['relative_error']:.1e}",
        )
        for row in rows
    ]
    columns = ("length", "operation", "form", "ms", "± ms", "times faster", "error")
    publish("Shortcuts", run_header(device, torch.float32, width=width), columns, cells, rows, json_path)


def measure(length: int, width: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Every form of both channels, for one sequence of ``length``."""
    random = torch.Generator().manual_seed(length)
    # v is an output of SiLU, whose mean is not zero, so its prefix sums grow.
    v = F.silu(torch.randn(length, width, generator=random)).to(device)
    times = (1_500_000_000 + torch.exp(13 * torch.rand(length + 1, generator=random)).long().cumsum(0)).to(device)
    weights = 0.02 * torch.randn(NUM_TIME_BUCKETS + length, generator=random).to(device)
    ts_weights, recent = weights[:NUM_TIME_BUCKETS], weights[NUM_TIME_BUCKETS:]
    forms: dict[tuple[str, str], Callable[..., Tensor]] = {
        ("temporal", "tiles"): functools.partial(temporal_tiles, buckets=list(bucket_tiles(times))),
        ("temporal", "tiles, their buckets too"): lambda v, w: temporal_tiles(v, w, buckets=bucket_tiles(times)),
        ("temporal", "segments"): functools.partial(temporal_segments, times=times),
        ("positional", "tiles"): positional_tiles,
        ("positional", "convolution"): positional_convolution,
    }
    rows: list[dict[str, Any]] = []
    tiles_ms = 0.0
    for (operation, name), form in forms.items():
        operand = ts_weights if operation == "temporal" else recent
        if name == "tiles":
            exact = form(v.double(), operand.double())
        error = ((form(v, operand).double() - exact).norm() / exact.norm()).item()
        if not error <= 1e-5:
            raise RuntimeError(f"{operation} by {name} differs from float64 by {error:.1e}")
        figures = timed(lambda form=form, operand=operand: form(v, operand), device, seconds)  # type: ignore[misc]
        tiles_ms = figures["ms"] if name == "tiles" else tiles_ms
        found = {"length": length, "operation": operation, "form": name, "relative_error": error}
        rows.append(found | figures | {"times_faster": tiles_ms / figures["ms"]})
    return rows


def temporal_tiles(v: Tensor, ts_weights: Tensor, *, buckets: Iterable[Tensor]) -> Tensor:
    """(L, dv) for v (L, dv), w_ts (129,) and the buckets of `bucket_tiles`."""
    out = torch.empty_like(v)
    for rows, bucket in zip(v.split(BLOCK), buckets, strict=True):
        last = bucket.shape[1]
        tile = ts_weights.index_select(0, bucket.flatten()).view(bucket.shape).tril_(last - len(rows))
        out[last - len(rows) : last] = tile @ v[:last]
    return out


def bucket_tiles(times: Tensor) -> Iterator[Tensor]:
    """The (queries, keys) int32 time buckets of each block of queries, which a plan keeps for all blocks of a decoder."""
    length = len(times) - 1
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        yield time_bucket(times[first + 1 : last + 1, None] - times[None, :last]).int()


def temporal_segments(v: Tensor, ts_weights: Tensor, *, times: Tensor) -> Tensor:
    """The result of `temporal_tiles`, for times that do not step back."""
    prefix = F.pad(v.double().cumsum(0).to(v.dtype), (0, 0, 1, 0))
    steps = ts_weights.diff(prepend=ts_weights.new_zeros(1))
    least = bucket_starts(times.device)
    # Buckets that no difference of this sequence reaches have no keys.
    reached = int(torch.searchsorted(least, (times[-1] - times[0])[None], right=True)) or 1
    queries = torch.arange(len(v), device=v.device)[:, None] + 1
    out = torch.empty_like(v)
    for first in range(0, len(v), SEGMENT_ROWS):
        rows = slice(first, min(first + SEGMENT_ROWS, len(v)))
        # The keys before `ends` are those with j ≤ i and time ≤ next time − least Δ of the bucket.
        latest = times[1:][rows, None] - least[None, :reached]
        ends = torch.searchsorted(times, latest, right=True).minimum(queries[rows])
        out[rows] = F.embedding_bag(ends, prefix, per_sample_weights=steps[:reached].expand(ends.shape), mode="sum")
    return out


@functools.cache
def bucket_starts(device: torch.device) -> Tensor:
    """(129,) int64, the smallest whole Δ ≥ 0 in each bucket or a later one, found by bisection with the formula itself."""
    bucket = torch.arange(NUM_TIME_BUCKETS)
    low, high = torch.zeros_like(bucket), torch.full_like(bucket, 2**62)
    for _ in range(63):
        middle = low + (high - low) // 2
        found = time_bucket(middle) >= bucket
        low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
    return high.to(device)


def positional_tiles(v: Tensor, recent: Tensor) -> Tensor:
    """(L, dv) for v (L, dv) and ``recent`` (L,), the weights of the distances i − j = 0, 1, …."""
    # The tile of the last block is the widest; the tile of every other block is a range of its columns.
    width = BLOCK * -(-len(v) // BLOCK)
    distance = torch.arange(BLOCK, device=v.device)[:, None] - torch.arange(BLOCK - width, BLOCK, device=v.device)
    widest = recent[distance.clamp(0, len(v) - 1)].tril_(width - BLOCK)
    out = torch.empty_like(v)
    for first in range(0, len(v), BLOCK):
        rows = v[first : first + BLOCK]
        start = width - BLOCK - first
        out[first : first + BLOCK] = widest[: len(rows), start : start + first + len(rows)] @ v[: first + len(rows)]
    return out


def positional_convolution(v: Tensor, recent: Tensor) -> Tensor:
    """The result of `positional_tiles`, by transforms of twice the length."""
    size = 2 * len(v)
    product = torch.fft.rfft(recent, size)[None] * torch.fft.rfft(v.T.contiguous(), size)
    return torch.fft.irfft(product, size)[:, : len(v)].T


if __name__ == "__main__":
    typer.run(main)
