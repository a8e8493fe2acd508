"""The norms on Triton: one pass forward, one backward, whole rows on chip; custom operators and their autograd.

Dropout draws Philox numbers from (seed, row, eight columns): 128 bits give eight elements sixteen bits each. Backward draws
them again, so no mask is kept. The seed is a tensor on the device, drawn by torch's generator.

Legend: R rows, w width.
"""

# Triton's kernels hold types that mypy does not know.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import operator
from kernels.variant import Variant

TILE = 2048  # elements that a program of 4 warps holds of each operand


@triton.jit
def _stays(p_seed, i_row, WIDTH: tl.constexpr, DROPPED: tl.constexpr):
    """(rows, WIDTH) whether an element stays."""
    i_draw = tl.arange(0, WIDTH // 8)
    columns = tl.broadcast_to(i_draw[None, :], (i_row.shape[0], WIDTH // 8)).to(tl.uint32)
    rows = tl.broadcast_to(i_row[:, None], (i_row.shape[0], WIDTH // 8)).to(tl.uint32)
    zero = columns * 0
    r0, r1, r2, r3 = tl.philox(tl.load(p_seed), columns, rows, zero, zero)
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (i_row.shape[0], WIDTH)) >= DROPPED


@triton.jit
def norm_kernel(
    p_a, p_u, p_seed, p_y, p_inverse, num_rows, eps,
    W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DROPPED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_column = tl.arange(0, WIDTH)
    m_tile = (i_row[:, None] < num_rows) & (i_column[None, :] < W)
    place = i_row[:, None].to(tl.int64) * W + i_column[None, :]
    b_a = tl.load(p_a + place, mask=m_tile, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(b_a * b_a, 1) * (1.0 / W) + eps)
    b_y = b_a * inverse[:, None]
    if GATED:
        b_y *= tl.load(p_u + place, mask=m_tile, other=0.0).to(tl.float32)
    if DROPPED:
        b_y = tl.where(_stays(p_seed, i_row, WIDTH, DROPPED), b_y * (65536.0 / (65536 - DROPPED)), 0.0)
    tl.store(p_y + place, b_y.to(p_y.dtype.element_ty), mask=m_tile)
    tl.store(p_inverse + i_row, inverse, mask=i_row < num_rows)


@triton.jit
def norm_backward_kernel(
    p_grad, p_a, p_u, p_seed, p_inverse, p_da, p_du, num_rows,
    W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DROPPED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_column = tl.arange(0, WIDTH)
    m_tile = (i_row[:, None] < num_rows) & (i_column[None, :] < W)
    place = i_row[:, None].to(tl.int64) * W + i_column[None, :]
    inverse = tl.load(p_inverse + i_row, mask=i_row < num_rows, other=0.0)
    b_normed = tl.load(p_a + place, mask=m_tile, other=0.0).to(tl.float32) * inverse[:, None]
    b_g = tl.load(p_grad + place, mask=m_tile, other=0.0).to(tl.float32)
    if DROPPED:
        b_g = tl.where(_stays(p_seed, i_row, WIDTH, DROPPED), b_g * (65536.0 / (65536 - DROPPED)), 0.0)
    if GATED:
        tl.store(p_du + place, (b_g * b_normed).to(p_du.dtype.element_ty), mask=m_tile)
        b_g *= tl.load(p_u + place, mask=m_tile, other=0.0).to(tl.float32)
    mean = tl.sum(b_g * b_normed, 1) * (1.0 / W)
    b_da = (b_g - b_normed * mean[:, None]) * inverse[:, None]
    tl.store(p_da + place, b_da.to(p_da.dtype.element_ty), mask=m_tile)


def _launch(width: int, dropped: int, gated: bool) -> dict[str, Any]:
    padded = max(16, triton.next_power_of_2(width))
    rows = max(1, min(64, TILE // padded))
    num_warps = 4 if padded < 1024 else 8
    return {"W": width, "ROWS": rows, "WIDTH": padded, "DROPPED": dropped, "GATED": gated, "num_warps": num_warps}


@operator("kernels::gated_rms_norm")
def norm_op(
    a: Tensor,
    u: Optional[Tensor],  # noqa: UP045  (torch.library reads the annotation)
    seed: Optional[Tensor],  # noqa: UP045
    eps: float,
    dropped: int,
) -> tuple[Tensor, Tensor]:
    """The result (R, w) and, for backward, the inverse norms (R,) float32; ``seed`` (1,) int64 where ``dropped``."""
    a, u = a.contiguous(), None if u is None else u.contiguous()
    y, inverse = torch.empty_like(a), torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    if y.numel():
        launch = _launch(a.shape[1], dropped, u is not None)
        norm_kernel[(triton.cdiv(a.shape[0], launch["ROWS"]),)](a, u, seed, y, inverse, a.shape[0], eps, **launch)
    return y, inverse


@norm_op.register_fake
def _(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(a, memory_format=torch.contiguous_format)
    return y, a.new_empty(a.shape[0], dtype=torch.float32)


@operator("kernels::gated_rms_norm_backward")
def norm_backward_op(
    grad: Tensor,
    a: Tensor,
    u: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    inverse: Tensor,
    dropped: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of a and u (empty without a gate)."""
    grad, a, u = grad.contiguous(), a.contiguous(), None if u is None else u.contiguous()
    da, du = torch.empty_like(a), a.new_empty(0) if u is None else torch.empty_like(u)
    if da.numel():
        launch = _launch(a.shape[1], dropped, u is not None)
        norm_backward_kernel[(triton.cdiv(a.shape[0], launch["ROWS"]),)](
            grad, a, u, seed, inverse, da, du, a.shape[0], **launch
        )
    return da, du


@norm_backward_op.register_fake
def _(grad: Tensor, a: Tensor, u: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    return da, a.new_empty(0) if u is None else torch.empty_like(da)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, u, seed, _, ctx.dropped = inputs
    ctx.save_for_backward(a, u, seed, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    a, u, seed, inverse = ctx.saved_tensors
    da, du = norm_backward_op(grad, a, u, seed, inverse, ctx.dropped)
    return da, None if u is None else du, None, None, None


norm_op.register_autograd(_backward, setup_context=_setup_context)


def aot_variants() -> list[Variant]:
    """Both kernels, gated and not, with and without dropout, at the widths of the configurations."""
    return [
        _variant(kernel, dtype, width, dropped, gated)
        for dtype in ("bf16", "fp32")
        for width in (16, 50, 64, 150, 192, 256, 768)
        for dropped in (0, 13_107)
        for gated in (False, True)
        for kernel in (norm_kernel, norm_backward_kernel)
    ]


def _variant(kernel: Any, dtype: str, width: int, dropped: int, gated: bool) -> Variant:
    launch = _launch(width, dropped, gated)
    num_warps = launch.pop("num_warps")
    constants = launch | ({} if gated else {"p_u": None}) | ({} if dropped else {"p_seed": None})
    types = {"p_seed": "*i64", "p_inverse": "*fp32", "num_rows": "i32", "eps": "fp32"}
    types |= dict.fromkeys(("p_a", "p_u", "p_y", "p_grad", "p_da", "p_du"), f"*{dtype}")
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
    name = f"{dtype} w={width}{' gated' if gated else ''}{' dropout' if dropped else ''}"
    return Variant(kernel, name, types, constants, num_warps, 1)
