"""The Triton form of `kernels.silu_split`: kernels, custom operators and their autograd.

Forward and backward take one pass over the projection. A program takes a block of rows of one view and one of the four parts.
u keeps its rows; v, q and k are written as (G, T, width).

Legend: R = M·T rows, M views, T tokens, H heads, G = M·H groups.
"""

# mypy does not know the types in Triton kernels.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import operator
from kernels.variant import Variant

TILE = 4096  # elements that a program of 4 warps holds


@triton.jit
def _places(i_view, num_tokens, token, column, start, COLUMNS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The places of a tile (tokens, columns) of a part: in the projection, and in the part by group."""
    row = i_view.to(tl.int64) * num_tokens + token
    projected = row[:, None] * COLUMNS + start + column[None, :]
    group = i_view * HEADS + column // WIDTH
    by_group = (group[None, :].to(tl.int64) * num_tokens + token[:, None]) * WIDTH + column[None, :] % WIDTH
    return projected, by_group


@triton.jit
def _part(p_projected, p_part, i_view, num_tokens, token, start,
          COLUMNS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    column = tl.arange(0, triton.next_power_of_2(HEADS * WIDTH))
    projected, by_group = _places(i_view, num_tokens, token, column, start, COLUMNS, HEADS, WIDTH)
    m_tile = (token[:, None] < num_tokens) & (column[None, :] < HEADS * WIDTH)
    x = tl.load(p_projected + projected, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_part + by_group, (x / (1.0 + tl.exp(-x))).to(p_part.dtype.element_ty), mask=m_tile)


@triton.jit
def _part_backward(p_projected, p_part, p_d_projected, i_view, num_tokens, token, start,
                   COLUMNS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    column = tl.arange(0, triton.next_power_of_2(HEADS * WIDTH))
    projected, by_group = _places(i_view, num_tokens, token, column, start, COLUMNS, HEADS, WIDTH)
    m_tile = (token[:, None] < num_tokens) & (column[None, :] < HEADS * WIDTH)
    x = tl.load(p_projected + projected, mask=m_tile, other=0.0).to(tl.float32)
    grad = tl.load(p_part + by_group, mask=m_tile, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-x))
    grad = grad * s * (1.0 + x * (1.0 - s))
    tl.store(p_d_projected + projected, grad.to(p_d_projected.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def split_kernel(
    p_projected, p_u, p_v, p_q, p_k, num_tokens, num_blocks,
    HEADS: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_view, i_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    token = i_block * ROWS + tl.arange(0, ROWS)
    columns: tl.constexpr = HEADS * (4 * DV + 2 * DQK)
    v: tl.constexpr = 3 * HEADS * DV
    q: tl.constexpr = 4 * HEADS * DV
    k: tl.constexpr = HEADS * (4 * DV + DQK)
    if tl.program_id(1) == 0:
        # One group as wide as all of u, so that its rows stay rows.
        _part(p_projected, p_u, i_view, num_tokens, token, 0, columns, 1, 3 * HEADS * DV)
    elif tl.program_id(1) == 1:
        _part(p_projected, p_v, i_view, num_tokens, token, v, columns, HEADS, DV)
    elif tl.program_id(1) == 2:
        _part(p_projected, p_q, i_view, num_tokens, token, q, columns, HEADS, DQK)
    else:
        _part(p_projected, p_k, i_view, num_tokens, token, k, columns, HEADS, DQK)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def split_backward_kernel(
    p_projected, p_du, p_dv, p_dq, p_dk, p_d_projected, num_tokens, num_blocks,
    HEADS: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_view, i_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    token = i_block * ROWS + tl.arange(0, ROWS)
    columns: tl.constexpr = HEADS * (4 * DV + 2 * DQK)
    v: tl.constexpr = 3 * HEADS * DV
    q: tl.constexpr = 4 * HEADS * DV
    k: tl.constexpr = HEADS * (4 * DV + DQK)
    if tl.program_id(1) == 0:
        _part_backward(p_projected, p_du, p_d_projected, i_view, num_tokens, token, 0, columns, 1, 3 * HEADS * DV)
    elif tl.program_id(1) == 1:
        _part_backward(p_projected, p_dv, p_d_projected, i_view, num_tokens, token, v, columns, HEADS, DV)
    elif tl.program_id(1) == 2:
        _part_backward(p_projected, p_dq, p_d_projected, i_view, num_tokens, token, q, columns, HEADS, DQK)
    else:
        _part_backward(p_projected, p_dk, p_d_projected, i_view, num_tokens, token, k, columns, HEADS, DQK)


def _launch(num_heads: int, dv: int, dqk: int) -> dict[str, Any]:
    rows = max(1, min(64, TILE // triton.next_power_of_2(3 * num_heads * dv)))
    return {"HEADS": num_heads, "DV": dv, "DQK": dqk, "ROWS": rows, "num_warps": 4, "num_stages": 1}


@operator("kernels::silu_split")
def silu_split_op(
    projected: Tensor, num_views: int, num_heads: int, dv: int, dqk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.silu_split` after its checks."""
    projected = projected.contiguous()
    outputs = _empty_parts(projected, num_views, num_heads, dv, dqk)
    if projected.numel():
        launch, num_tokens = _launch(num_heads, dv, dqk), projected.shape[0] // num_views
        num_blocks = triton.cdiv(num_tokens, launch["ROWS"])
        split_kernel[(num_views * num_blocks, 4)](projected, *outputs, num_tokens, num_blocks, **launch)
    return outputs


@silu_split_op.register_fake
def _(projected: Tensor, num_views: int, num_heads: int, dv: int, dqk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_parts(projected, num_views, num_heads, dv, dqk)


@operator("kernels::silu_split_backward")
def silu_split_backward_op(
    projected: Tensor, du: Tensor, d_values: Tensor, dq: Tensor, dk: Tensor, num_views: int, num_heads: int
) -> Tensor:
    """The gradient of the projection."""
    projected, *grads = (tensor.contiguous() for tensor in (projected, du, d_values, dq, dk))
    d_projected = torch.empty_like(projected)
    if projected.numel():
        launch, num_tokens = _launch(num_heads, d_values.shape[2], dq.shape[2]), projected.shape[0] // num_views
        num_blocks = triton.cdiv(num_tokens, launch["ROWS"])
        split_backward_kernel[(num_views * num_blocks, 4)](
            projected, *grads, d_projected, num_tokens, num_blocks, **launch
        )
    return d_projected


@silu_split_backward_op.register_fake
def _(projected: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(projected, memory_format=torch.contiguous_format)


def _empty_parts(
    projected: Tensor, num_views: int, num_heads: int, dv: int, dqk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, groups = projected.shape[0], num_views * num_heads
    v, q, k = (projected.new_empty(groups, rows // num_views, width) for width in (dv, dqk, dqk))
    return projected.new_empty(rows, 3 * num_heads * dv), v, q, k


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    projected, ctx.num_views, ctx.num_heads, *_ = inputs
    ctx.save_for_backward(projected)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (projected,) = ctx.saved_tensors
    return silu_split_backward_op(projected, *grads, ctx.num_views, ctx.num_heads), None, None, None, None


silu_split_op.register_autograd(_backward, setup_context=_setup_context)


def aot_variants() -> list[Variant]:
    """Both kernels at the widths of the configurations."""
    return [
        variant
        for dtype in ("bf16", "fp32")
        for num_heads, width in ((1, 16), (1, 50), (1, 64), (2, 64), (4, 64))
        for variant in shape_variants(dtype, num_heads, width, width)
    ]


def shape_variants(dtype: str, num_heads: int, dv: int, dqk: int) -> list[Variant]:
    """The variants that forward and backward launch for one shape."""
    return [_variant(kernel, dtype, num_heads, dv, dqk) for kernel in (split_kernel, split_backward_kernel)]


def _variant(kernel: Any, dtype: str, num_heads: int, dv: int, dqk: int) -> Variant:
    constants = _launch(num_heads, dv, dqk)
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = {
        name: f"*{dtype}" if name.startswith("p_") else "i32" for name in kernel.arg_names if name not in constants
    }
    return Variant(kernel, f"{dtype} H={num_heads} dqk={dqk} dv={dv}", types, constants, num_warps, num_stages)
