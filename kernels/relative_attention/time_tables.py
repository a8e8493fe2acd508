"""Where the time buckets of `reference.time_bucket` begin, in the forms in which the Triton kernels look them up."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.relative_attention.reference import NUM_TIME_BUCKETS

# 11 bits of a float32: sign, exponent and two of mantissa.
NUM_CELLS = 2048


@functools.cache
def time_thresholds(device: torch.device) -> Tensor:
    """(129,) float32: entry b is the smallest float32 |Δ| whose time bucket is at least b.

    Found by bisection over float32 with the formula of `reference.time_bucket` itself, on the CPU, so that every device
    puts every Δ in the bucket that the CPU puts it in.
    """
    bucket = torch.arange(NUM_TIME_BUCKETS)
    low = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.int32)
    high = torch.tensor([2.0**63]).view(torch.int32).expand(NUM_TIME_BUCKETS).clone()
    for _ in range(32):
        middle = low + (high - low) // 2
        reached = (torch.log(middle.view(torch.float32).clamp(min=1)) / 0.301).long() >= bucket
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle + 1)
    return high.view(torch.float32).to(device)


@functools.cache
def time_cells(device: torch.device) -> Tensor:
    """(2048,) int64, by the upper 11 bits of a float32 Δ: the bits of a threshold, and times 2³² a bucket b.

    |Δ| in the cell has bucket b below the threshold and b + 1 from it on. Thresholds lie apart by a factor of 1.35 and a
    cell spans at most 1.25, so that it holds at most one; without one the threshold is NaN, which nothing reaches.
    """
    thresholds = time_thresholds(torch.device("cpu"))[1:].contiguous()
    cell = torch.arange(NUM_CELLS // 2, dtype=torch.int64) << 21
    first, last = (bits.to(torch.int32).view(torch.float32) for bits in (cell, cell + (1 << 21) - 1))
    # Infinities and NaN, which no time difference is, would compare as no number does.
    first, last = (x.nan_to_num(nan=torch.inf) for x in (first, last))
    bucket = torch.bucketize(first, thresholds, right=True)
    inside = torch.bucketize(last, thresholds, right=True) - bucket
    assert inside.max() == 1, "a cell holds two thresholds"
    threshold = torch.where(inside == 1, thresholds[bucket.clamp(max=NUM_TIME_BUCKETS - 2)], torch.nan)
    held = threshold.view(torch.int32).to(torch.int64) & 0xFFFFFFFF | bucket << 32
    return torch.cat([held, held]).to(device)


@functools.cache
def code_thresholds(device: torch.device) -> Tensor:
    """(258,) int32, by the code of a tile (see `work_plan`): the smallest whole |Δ| of the upper bucket.

    Rounding to float32 keeps order, so comparing whole seconds puts every Δ where comparing float32 puts it. Thresholds
    over 2³¹ − 1, of which no tile with a code has need, are 2³¹ − 1; a tile of one bucket has 0, as both weights are equal.
    """
    thresholds = time_thresholds(torch.device("cpu"))
    low, high = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.int64), torch.full((NUM_TIME_BUCKETS,), 2**31 - 1)
    for _ in range(31):
        middle = (low + high) // 2
        reached = middle.to(torch.float32) >= thresholds
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle + 1)
    return torch.cat([high, torch.zeros_like(high)]).to(torch.int32).to(device)
