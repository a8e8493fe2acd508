"""The Triton form of relative attention: launch configurations, custom operators and their autograd.

Legend: B sequences, N max_seq_len, T tokens, G groups (views × heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import compute_capability, contiguous, operator
from kernels.relative_attention import triton_bias_kernels as bias
from kernels.relative_attention import triton_semantic_kernels as semantic
from kernels.relative_attention.reference import NUM_TIME_BUCKETS
from kernels.relative_attention.time_tables import code_thresholds, time_cells, time_thresholds
from kernels.relative_attention.torch_form import sum_diagonals
from kernels.relative_attention.work_plan import WorkLists


@dataclass(frozen=True)
class Launch:
    """The launch of one kernel: how many keys or queries a program takes at a time, and Triton's options."""

    step: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched for one pair of widths.

    Attributes:
        block: number of queries or keys of a program, and both sides of a tile of the plan.
        columns: number of columns of v and its gradients, with all groups side by side, of a program of a bias kernel.
        forward, query, key: launches of the semantic kernels.
        bias_forward, bias_value: launches of the bias kernels.
        gradient: launch of the kernels of the weights' gradients, whose tiles are (block, block).
    """

    block: int
    columns: int
    forward: Launch
    query: Launch
    key: Launch
    bias_forward: Launch
    bias_value: Launch
    gradient: Launch

    @classmethod
    def choose(cls, num_groups: int, dqk: int, dv: int, itemsize: int, precision: str, arch: int) -> LaunchConfig:
        """Each branch compiles without spilled registers for its compute capability (`python -m kernels.aot`)."""
        block, width = cls.choose_block(dqk, dv, itemsize, precision), max(dqk, dv)
        padded = triton.next_power_of_2(max(dv, 16))
        columns = min(triton.next_power_of_2(num_groups) * padded, 128 if arch >= 90 else 64)
        if itemsize == 4:
            short = 16 if precision == "ieee" or width <= 64 else 32
            semantic_launch, bias_launch = Launch(min(short, block), 8, 1), Launch(16, 4, 1)
            return cls(block, min(columns, 64), *[semantic_launch] * 3, *[bias_launch] * 3)
        if width > 128:
            # 8 warps compute tiles of 32 rows twice, but on 4 warps the kernel of dk and dv would spill.
            queries, keys = Launch(32, 4, 1), Launch(32, 8, 1)
            return cls(block, columns, queries, queries, keys, *[Launch(32, 4, 2)] * 3)
        # A warp's instruction has 16 rows, so more than 4 warps would compute tiles of 64 rows twice.
        double, whole, half, quarter = (Launch(step, 4, 2) for step in (128, 64, 32, 16))
        aligned = dqk % 16 == dv % 16 == 0  # otherwise the masks of columns take registers too
        if width <= 16:
            launches = (double, double, whole)
        elif arch >= 90:
            launches = (whole, whole, half if width > 64 else whole) if aligned else (half, half, half)
        elif aligned:
            launches = (whole, half, quarter) if width > 64 else (whole, whole, half)
        else:
            launches = (half, half, Launch(16, 4, 1))
        return cls(block, columns, *launches, whole, whole, whole if arch >= 90 else Launch(64, 4, 1))

    @staticmethod
    def choose_block(dqk: int, dv: int, itemsize: int, precision: str) -> int:
        """``block``. It only compares the sizes, so that torch.compile can pass them as symbols."""
        width, aligned = max(dqk, dv), dqk % 16 == dv % 16 == 0
        if itemsize == 4 and precision == "ieee":  # exact products run on vector units with operands in registers
            return 32 if width <= 64 and aligned else 16
        if width > 128:
            return 32 if itemsize == 2 else 16
        # float32 rows whose width is not a multiple of 16 are loaded element by element, each with its own address.
        return 64 if itemsize == 2 or (width <= 64 and aligned) or width <= 16 else 32


@dataclass(frozen=True)
class _Tables:
    """The tables of one call: P as Toeplitz tiles, and the time weights by cell and by code."""

    positions: Tensor
    cells: Tensor
    selects: Tensor


def _make_tables(ts_weights: Tensor, pos_weights: Tensor, max_seq_len: int, block: int, dtype: torch.dtype) -> _Tables:
    device, num_blocks = ts_weights.device, triton.cdiv(max_seq_len, block)
    lookup, thresholds = time_cells(device), code_thresholds(device)
    tables = _Tables(
        torch.empty(num_blocks, block, block, dtype=dtype, device=device),
        torch.empty_like(lookup),
        torch.empty(thresholds.numel(), 3, dtype=torch.int32, device=device),
    )
    bias.tables_kernel[(num_blocks + 1,)](
        ts_weights, pos_weights, lookup, thresholds, tables.cells, tables.selects, tables.positions, max_seq_len,
        num_blocks, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return tables


@operator("kernels::relative_attention")
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    seq_offsets: Tensor,
    timestamps: Tensor,
    lists: list[Tensor],
    max_seq_len: int,
    any_wide: bool,
    precision: str,
) -> Tensor:
    """The result (G, T, 3·dv); ``lists`` are the tensors of `WorkLists` for the block of `LaunchConfig`."""
    work = WorkLists(*lists)
    q, k, v, ts_weights, pos_weights = contiguous(q, k, v, ts_weights, pos_weights)
    seq_offsets, timestamps = contiguous(seq_offsets, timestamps)
    groups, num_tokens, dqk, dv = *q.shape, v.shape[2]
    config = LaunchConfig.choose(groups, dqk, dv, q.itemsize, precision, compute_capability(q.device))
    out = v.new_empty(groups, num_tokens, 3 * dv)
    if not out.numel():
        return out
    block, num_items = config.block, work.query_items.shape[0]
    semantic.semantic_forward_kernel[(num_items * groups,)](
        q, k, v, out, seq_offsets, work.query_items, num_tokens, max_seq_len, groups,
        DQK=dqk, DV=dv, BLOCK=block, STEP=config.forward.step, PRECISION=precision, **config.forward.options(),
    )  # fmt: skip
    tables = _make_tables(ts_weights, pos_weights, max_seq_len, block, q.dtype)
    num_columns = column_blocks(groups, dv, config)
    for times in (work.seconds, timestamps)[: 1 + any_wide]:
        bias.bias_forward_kernel[(num_items * num_columns,)](
            v, out, seq_offsets, times, ts_weights, tables.cells, tables.selects, work.codes, tables.positions,
            work.query_items, num_tokens, groups, num_columns, work.codes.shape[1],
            DV=dv, COLUMNS=config.columns, BLOCK=block, STEP=config.bias_forward.step, PRECISION=precision,
            **config.bias_forward.options(),
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
    lists: list[Tensor],
    max_seq_len: int,
    any_wide: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, ts_weights and pos_weights."""
    work = WorkLists(*lists)
    grad, q, k, v, seq_offsets, timestamps = contiguous(grad, q, k, v, seq_offsets, timestamps)
    ts_weights, pos_weights = contiguous(ts_weights, pos_weights)
    groups, num_tokens, dqk, dv = *q.shape, v.shape[2]
    dq, dk, d_values = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not grad.numel():
        return dq, dk, d_values, torch.zeros_like(ts_weights), torch.zeros_like(pos_weights)
    config = LaunchConfig.choose(groups, dqk, dv, q.itemsize, precision, compute_capability(q.device))
    block, num_items, num_columns = config.block, work.query_items.shape[0], column_blocks(groups, dv, config)
    times_of_launches = (work.seconds, timestamps)[: 1 + any_wide]
    semantic.semantic_query_kernel[(num_items * groups,)](
        q, k, v, grad, dq, seq_offsets, work.query_items, num_tokens, max_seq_len, groups,
        DQK=dqk, DV=dv, BLOCK=block, STEP=config.query.step, PRECISION=precision, **config.query.options(),
    )  # fmt: skip
    tables = _make_tables(ts_weights, pos_weights, max_seq_len, block, q.dtype)
    bias_dv = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    for times in times_of_launches:
        bias.bias_value_kernel[(num_items * num_columns,)](
            grad, bias_dv, seq_offsets, times, ts_weights, tables.cells, tables.selects, work.codes, tables.positions,
            work.key_items, num_tokens, groups, num_columns, work.codes.shape[1],
            DV=dv, COLUMNS=config.columns, BLOCK=block, STEP=config.bias_value.step, PRECISION=precision,
            **config.bias_value.options(),
        )  # fmt: skip
    semantic.semantic_key_kernel[(num_items * groups,)](
        q, k, v, grad, bias_dv, dk, d_values, seq_offsets, work.key_items, num_tokens, max_seq_len, groups,
        DQK=dqk, DV=dv, BLOCK=block, STEP=config.key.step, PRECISION=precision, **config.key.options(),
    )  # fmt: skip
    columns = {"DV": dv, "COLUMNS": config.columns, "BLOCK": block}
    sums = torch.empty(num_items, num_columns * config.columns, dtype=torch.float32, device=v.device)
    bias.value_sums_kernel[(num_items * num_columns,)](
        v, sums, seq_offsets, work.query_items, num_tokens, groups, num_columns, **columns, **config.gradient.options()
    )
    options = {**columns, "COLUMN_BLOCKS": num_columns, "PRECISION": precision, **config.gradient.options()}
    time_partial = torch.empty(num_items, NUM_TIME_BUCKETS, dtype=torch.float32, device=q.device)
    for times in times_of_launches:
        bias.time_gradient_kernel[(num_items,)](
            v, grad, sums, time_partial, seq_offsets, times, time_thresholds(q.device),
            work.codes, work.tiles, work.tile_counts, work.query_items, num_tokens, groups, work.codes.shape[1], **options,
        )  # fmt: skip
    distances = work.counts.numel()
    # Enough programs to fill a GPU at short lengths and, at long ones, to share the many tiles next to the diagonal. The
    # partial sums take distances · splits · 16 KiB.
    splits = min(num_items, max(16, 512 // distances))
    position_partial = torch.empty(distances, splits, block, block, dtype=torch.float32, device=q.device)
    bias.position_gradient_kernel[(distances * splits,)](
        v, grad, position_partial, seq_offsets, work.query_items, work.counts, num_tokens, groups, splits, **options
    )
    d_ts_weights = time_partial.sum(0, dtype=torch.float64).to(ts_weights.dtype)
    # In the widest position tile, the tile at distance D lies D blocks to the left of the last columns.
    widest = position_partial.sum(1).flip(0).transpose(0, 1).reshape(block, distances * block)
    return dq, dk, d_values, d_ts_weights, sum_diagonals(widest, max_seq_len, pos_weights.numel()).to(pos_weights.dtype)


@attention_backward_op.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, ts_weights, pos_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])
    return q, k, v, ts_weights, pos_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, lists, ctx.max_seq_len, ctx.any_wide, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *lists)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors, lists = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
    gradients = attention_backward_op(grad, *tensors, lists, ctx.max_seq_len, ctx.any_wide, ctx.precision)
    return *gradients, None, None, [None] * len(lists), None, None, None


attention_op.register_autograd(_backward, setup_context=_setup_context)


def column_blocks(groups: int, dv: int, config: LaunchConfig) -> int:
    """The number of programs of a bias kernel that share a work item."""
    return triton.cdiv(groups * triton.next_power_of_2(max(dv, 16)), config.columns)
