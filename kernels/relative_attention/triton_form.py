"""Relative attention on Triton: the work lists, the launch configurations, the custom operators and their autograd.

Legend: B sequences, N max_seq_len, T tokens, G groups (views × heads).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import operator
from kernels.relative_attention import triton_kernels
from kernels.relative_attention.reference import NUM_TIME_BUCKETS
from kernels.relative_attention.torch_form import sum_diagonals


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched for one pair of widths.

    Attributes:
        block: queries of a program of the forward and dq kernels, keys of one of the dk/dv kernel.
        step: keys, or queries, that it takes at a time.
        groups: views × heads that one forward or dk/dv program carries, sharing its masks, buckets, P and T.
        num_warps, num_stages: Triton's, of the forward, dk/dv and dq kernels.
    """

    block: int
    step: int
    groups: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, num_groups: int, dqk: int, dv: int, itemsize: int, precision: str) -> LaunchConfig:
        """Each branch is what compiles for sm_80 and sm_90 without a spill (`python -m kernels.aot`)."""
        block, step = cls.tile(dqk, dv, itemsize, precision)
        if max(dqk, dv) <= 16 and not (itemsize == 4 and precision == "ieee"):
            # Three accumulators of (block, width) float32 a group. The tile of buckets, int64 differences and gathers
            # wants most of the other registers: hence the short steps.
            groups = min(triton.next_power_of_2(num_groups), 8 // itemsize)
            return cls(block, step, groups, num_warps=4, num_stages=2 if itemsize == 2 else 1)
        return cls(block, step, groups=1, num_warps=8, num_stages=1)

    @staticmethod
    def tile(dqk: int, dv: int, itemsize: int, precision: str) -> tuple[int, int]:
        """``block`` and ``step``: compared, not computed, so that torch.compile takes sizes that it knows as symbols."""
        width, aligned = max(dqk, dv), dqk % 16 == dv % 16 == 0
        if itemsize == 4 and precision == "ieee":  # exact products run on vector units, their operands in registers
            return (32, 16) if width <= 64 and aligned else (16, 16)
        if itemsize == 4 and width > 128:
            return 16, 32
        # Rows of float32 that are no multiple of 16 columns are loaded an element at a time, with an address each.
        if width <= 64 and (itemsize == 2 or aligned or width <= 16):
            return 64, 16
        return (32, 32) if width <= 128 else (32, 16)

    def launch(self, bias_gradient: bool = False) -> dict[str, int]:
        """The launch options; the two kernels of bias gradients hold one small tile, and spill on 8 warps for sm_80."""
        num_warps, num_stages = (4, 1) if bias_gradient else (self.num_warps, self.num_stages)
        return {"num_warps": num_warps, "num_stages": num_stages}


@dataclass(frozen=True)
class WorkLists:
    """The programs' work, heaviest first, for blocks of one size; all on the tensors' device, made without a transfer.

    Attributes:
        query_items, key_items: (T // block + B, 2) int64, (sequence, block); a query item's work is its block number + 1
            key blocks, a key item's the blocks from its own to the last. Sequence −1 pads the lists, whose true length
            only the device knows.
        counts: (ceil(N / block),) int32, the query items whose block number is at least the index.
    """

    query_items: Tensor
    key_items: Tensor
    counts: Tensor


@dataclass(frozen=True)
class WorkPlan:
    """The plan of the triton backend: work lists by block size."""

    seq_offsets: Tensor
    num_tokens: int
    max_seq_len: int
    _lists: dict[int, WorkLists] = field(default_factory=dict, repr=False)

    def lists(self, block: int) -> WorkLists:
        if block not in self._lists:
            self._lists[block] = make_work_lists(self.seq_offsets, self.num_tokens, self.max_seq_len, block)
        return self._lists[block]


def make_work_lists(seq_offsets: Tensor, num_tokens: int, max_seq_len: int, block: int) -> WorkLists:
    """See `WorkLists`. Offsets [0, 70, 80], block 64 → query items (0, 1), (0, 0), (1, 0), then padding."""
    device = seq_offsets.device
    num_sequences = seq_offsets.numel() - 1
    blocks = (seq_offsets.diff() + block - 1) // block
    ends = blocks.cumsum(0)
    item = torch.arange(num_tokens // block + num_sequences, device=device)
    sequence = torch.searchsorted(ends, item, right=True)
    real = sequence < num_sequences
    sequence = sequence.clamp(max=max(num_sequences - 1, 0))
    number = torch.where(real, item - (ends - blocks)[sequence], -1)
    after = torch.where(real, blocks[sequence] - 1 - number, -1)
    items = torch.stack([torch.where(real, sequence, -1), number], 1)
    distances = torch.arange(triton.cdiv(max_seq_len, block), device=device)
    counts = (blocks[None, :] - distances[:, None]).clamp(min=0).sum(1).to(torch.int32)
    by_number = torch.sort(number, descending=True, stable=True).indices
    by_after = torch.sort(after, descending=True, stable=True).indices
    return WorkLists(items[by_number].contiguous(), items[by_after].contiguous(), counts)


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


@operator("kernels::relative_attention")
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    seq_offsets: Tensor,
    timestamps: Tensor,
    query_items: Tensor,
    key_items: Tensor,
    counts: Tensor,
    max_seq_len: int,
    precision: str,
) -> Tensor:
    """(G, T, 3·dv); the lists are those of `LaunchConfig.choose`'s block for ``precision``, that of the products."""
    q, k, v, ts_weights, pos_weights = _contiguous(q, k, v, ts_weights, pos_weights)
    seq_offsets, timestamps = _contiguous(seq_offsets, timestamps)
    groups, num_tokens, dqk, dv = *q.shape, v.shape[2]
    config = LaunchConfig.choose(groups, dqk, dv, q.itemsize, precision)
    out = v.new_empty(groups, num_tokens, 3 * dv)
    group_blocks = triton.cdiv(groups, config.groups)
    if out.numel():
        triton_kernels.forward_kernel[(query_items.shape[0] * group_blocks,)](
            q, k, v, out, seq_offsets, timestamps, ts_weights, pos_weights, time_thresholds(q.device), query_items,
            num_tokens, max_seq_len, groups, group_blocks,
            DQK=dqk, DV=dv, GROUPS=config.groups, BLOCK=config.block, STEP=config.step, PRECISION=precision,
            **config.launch(),
        )  # fmt: skip
    return out


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], 3 * v.shape[2])


@operator("kernels::relative_attention_backward")
def attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    seq_offsets: Tensor,
    timestamps: Tensor,
    query_items: Tensor,
    key_items: Tensor,
    counts: Tensor,
    max_seq_len: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, ts_weights and pos_weights."""
    grad, q, k, v, seq_offsets, timestamps = _contiguous(grad, q, k, v, seq_offsets, timestamps)
    ts_weights, pos_weights = _contiguous(ts_weights, pos_weights)
    groups, num_tokens, dqk, dv = *q.shape, v.shape[2]
    dq, dk, d_values = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not grad.numel():
        return dq, dk, d_values, torch.zeros_like(ts_weights), torch.zeros_like(pos_weights)
    config = LaunchConfig.choose(groups, dqk, dv, q.itemsize, precision)
    block, thresholds = config.block, time_thresholds(q.device)
    launch, bias_launch = config.launch(), config.launch(bias_gradient=True)
    num_items, group_blocks = query_items.shape[0], triton.cdiv(groups, config.groups)
    triton_kernels.backward_query_kernel[(num_items * groups,)](
        q, k, v, grad, dq, seq_offsets, query_items, num_tokens, max_seq_len, groups,
        DQK=dqk, DV=dv, BLOCK=block, STEP=config.step, PRECISION=precision, **launch,
    )  # fmt: skip
    triton_kernels.backward_key_kernel[(num_items * group_blocks,)](
        q, k, v, grad, dk, d_values, seq_offsets, timestamps, ts_weights, pos_weights, thresholds, key_items,
        num_tokens, max_seq_len, groups, group_blocks,
        DQK=dqk, DV=dv, GROUPS=config.groups, BLOCK=block, STEP=config.step, PRECISION=precision, **launch,
    )  # fmt: skip
    time_partial = torch.empty(num_items, NUM_TIME_BUCKETS, dtype=torch.float32, device=q.device)
    triton_kernels.backward_time_kernel[(num_items,)](
        v, grad, time_partial, seq_offsets, timestamps, thresholds, query_items, num_tokens, groups,
        DV=dv, BLOCK=block, STEP=config.step, PRECISION=precision,
        **bias_launch,
    )  # fmt: skip
    distances = counts.numel()
    # Enough programs to fill a GPU at short lengths, and at long ones to share the many tiles next to the diagonal; the
    # partial sums take distances · splits · 16 KiB.
    splits = min(num_items, max(16, 512 // distances))
    position_partial = torch.empty(distances, splits, block, block, dtype=torch.float32, device=q.device)
    triton_kernels.backward_position_kernel[(distances * splits,)](
        v, grad, position_partial, seq_offsets, query_items, counts, num_tokens, groups, splits,
        DV=dv, BLOCK=block, PRECISION=precision, **bias_launch,
    )  # fmt: skip
    d_ts_weights = time_partial.sum(0, dtype=torch.float64).to(ts_weights.dtype)
    # The tile at distance D stands D blocks left of the last columns of the widest position tile.
    widest = position_partial.sum(1).flip(0).transpose(0, 1).reshape(block, distances * block)
    return dq, dk, d_values, d_ts_weights, sum_diagonals(widest, max_seq_len, pos_weights.numel()).to(pos_weights.dtype)


@attention_backward_op.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, ts_weights, pos_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])
    return q, k, v, ts_weights, pos_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_seq_len, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_backward_op(grad, *ctx.saved_tensors, ctx.max_seq_len, ctx.precision)
    return *gradients, None, None, None, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_setup_context)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
