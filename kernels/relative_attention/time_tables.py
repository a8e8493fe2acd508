"""The thresholds between the time buckets of `reference.time_bucket`, in the forms that the Triton kernels look up."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.relative_attention.reference import NUM_TIME_BUCKETS

# One cell for each value of the upper 11 bits of a float32: sign, exponent and two bits of the mantissa.
NUM_CELLS = 2048


@functools.cache
def time_thresholds(device: torch.device) -> Tensor:
    """(129,) float32: entry b is the smallest float32 |Δ| whose time bucket is at least b.

    They are found on the CPU by bisection over float32 with the formula of `reference.time_bucket`. So every device assigns
    every Δ to the same bucket as the CPU.
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
    """(2048,) int64, indexed by the upper 11 bits of a float32 Δ: the cell of Δ.

    The upper 32 bits of a cell are a bucket b, the lower ones a float32 threshold. A |Δ| in the cell has bucket b if it is below
    the threshold, and b + 1 otherwise. Thresholds are a factor of 1.35 apart and a cell spans at most a factor of 1.25, so a cell
    contains at most one. If it contains none, the threshold is NaN and the bucket is always b.
    """
    thresholds = time_thresholds(torch.device("cpu"))[1:].contiguous()
    cell = torch.arange(NUM_CELLS // 2, dtype=torch.int64) << 21
    first, last = (bits.to(torch.int32).view(torch.float32) for bits in (cell, cell + (1 << 21) - 1))
    # No time difference is infinite or NaN, and comparisons with NaN would be wrong.
    first, last = (x.nan_to_num(nan=torch.inf) for x in (first, last))
    bucket = torch.bucketize(first, thresholds, right=True)
    inside = torch.bucketize(last, thresholds, right=True) - bucket
    assert inside.max() == 1, "a cell has two thresholds"
    threshold = torch.where(inside == 1, thresholds[bucket.clamp(max=NUM_TIME_BUCKETS - 2)], torch.nan)
    held = threshold.view(torch.int32).to(torch.int64) & 0xFFFFFFFF | bucket << 32
    return torch.cat([held, held]).to(device)


@functools.cache
def code_thresholds(device: torch.device) -> Tensor:
    """(258,) int32, indexed by the code of a tile (see `work_plan`): the smallest whole |Δ| of the upper bucket.

    Rounding to float32 preserves the order, so comparing whole seconds gives the same bucket as comparing float32. Thresholds
    above 2³¹ − 1, which no tile with a code needs, are set to 2³¹ − 1. A tile of one bucket has 0, because its two weights are
    equal.
    """
    thresholds = time_thresholds(torch.device("cpu"))
    low, high = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.int64), torch.full((NUM_TIME_BUCKETS,), 2**31 - 1)
    for _ in range(31):
        middle = (low + high) // 2
        reached = middle.to(torch.float32) >= thresholds
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle + 1)
    return torch.cat([high, torch.zeros_like(high)]).to(torch.int32).to(device)
