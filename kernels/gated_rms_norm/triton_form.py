"""The Triton form of the norms: kernels, custom operators and their autograd.

Forward and backward take one pass each and hold whole rows on chip. Both compute the words of `kernels.dropout` from the key of
a row, so no dropout mask is kept.

Legend: R rows, w width.
"""

# mypy does not know the types in Triton kernels.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import operator
from kernels.dropout import FACTOR as DROPOUT_FACTOR
from kernels.splitmix import FACTORS, GOLDEN_GAMMA
from kernels.variant import Variant

GAMMA, FACTOR = tl.constexpr(GOLDEN_GAMMA), tl.constexpr(DROPOUT_FACTOR)
FACTOR_0, FACTOR_1 = tl.constexpr(FACTORS[0]), tl.constexpr(FACTORS[1])
TILE = 2048  # elements of each operand that a program of 4 warps holds


@triton.jit
def _multipliers(NUM_WORDS: tl.constexpr):
    """(NUM_WORDS,) int64: `kernels.splitmix.derive` of key 0, made odd."""
    x = (tl.arange(0, NUM_WORDS).to(tl.int64) + 1) * GAMMA
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FACTOR_0
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * FACTOR_1
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) | 1


@triton.jit
def _stays(keys, WIDTH: tl.constexpr, DROPPED: tl.constexpr):
    """keys (rows,) → (rows, WIDTH), whether an element is kept."""
    words = keys[:, None] * _multipliers(WIDTH // 4)[None, :]
    words = (words ^ (words >> 32)) * FACTOR
    even = tl.join(words & 0xFFFF, (words >> 32) & 0xFFFF)
    odd = tl.join((words >> 16) & 0xFFFF, (words >> 48) & 0xFFFF)
    lanes = tl.reshape(tl.join(even, odd), (keys.shape[0], WIDTH)).to(tl.int32)
    return (lanes ^ 0x8000) >= DROPPED  # flipping the top bit adds 2¹⁵ to the lane as an int16


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    p_a, p_u, p_keys, p_y, p_inverse, num_rows, eps,
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
        b_keys = tl.load(p_keys + i_row, mask=i_row < num_rows, other=0)
        b_y = tl.where(_stays(b_keys, WIDTH, DROPPED), b_y * (65536.0 / (65536 - DROPPED)), 0.0)
    tl.store(p_y + place, b_y.to(p_y.dtype.element_ty), mask=m_tile)
    tl.store(p_inverse + i_row, inverse, mask=i_row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def norm_backward_kernel(
    p_grad, p_a, p_u, p_keys, p_inverse, p_da, p_du, num_rows,
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
        b_keys = tl.load(p_keys + i_row, mask=i_row < num_rows, other=0)
        b_g = tl.where(_stays(b_keys, WIDTH, DROPPED), b_g * (65536.0 / (65536 - DROPPED)), 0.0)
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
    constants = {"W": width, "ROWS": rows, "WIDTH": padded, "DROPPED": dropped, "GATED": gated}
    return constants | {"num_warps": num_warps, "num_stages": 1}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@operator("kernels::gated_rms_norm")
def norm_op(
    a: Tensor,
    u: Optional[Tensor],  # noqa: UP045  (torch.library reads the annotation)
    keys: Optional[Tensor],  # noqa: UP045
    eps: float,
    dropped: int,
) -> tuple[Tensor, Tensor]:
    """The result (R, w) and, for backward, the inverse norms (R,) float32; ``keys`` (R,) int64 or, without dropout, None."""
    a, u, keys = a.contiguous(), _contiguous(u), _contiguous(keys)
    y, inverse = torch.empty_like(a), torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    if y.numel():
        launch = _launch(a.shape[1], dropped, u is not None)
        norm_kernel[(triton.cdiv(a.shape[0], launch["ROWS"]),)](a, u, keys, y, inverse, a.shape[0], eps, **launch)
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
    keys: Optional[Tensor],  # noqa: UP045
    inverse: Tensor,
    dropped: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of a and u (empty without a gate)."""
    grad, a, u, keys = grad.contiguous(), a.contiguous(), _contiguous(u), _contiguous(keys)
    da, du = torch.empty_like(a), a.new_empty(0) if u is None else torch.empty_like(u)
    if da.numel():
        launch = _launch(a.shape[1], dropped, u is not None)
        norm_backward_kernel[(triton.cdiv(a.shape[0], launch["ROWS"]),)](
            grad, a, u, keys, inverse, da, du, a.shape[0], **launch
        )
    return da, du


@norm_backward_op.register_fake
def _(grad: Tensor, a: Tensor, u: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    return da, a.new_empty(0) if u is None else torch.empty_like(da)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, u, keys, _, ctx.dropped = inputs
    ctx.save_for_backward(a, u, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    a, u, keys, inverse = ctx.saved_tensors
    da, du = norm_backward_op(grad, a, u, keys, inverse, ctx.dropped)
    return da, None if u is None else du, None, None, None


norm_op.register_autograd(_backward, setup_context=_setup_context)


def aot_variants() -> list[Variant]:
    """Both kernels with and without gate and dropout, at the widths of the configurations."""
    return [
        variant
        for dtype in ("bf16", "fp32")
        for width in (16, 50, 64, 150, 192, 256, 768)
        for dropped in (0, 13_107)
        for gated in (False, True)
        for variant in shape_variants(dtype, width, dropped, gated)
    ]


def shape_variants(dtype: str, width: int, dropped: int, gated: bool) -> list[Variant]:
    """The variants that forward and backward launch for one width; ``dropped``: see `kernels.dropout.dropout_steps`."""
    return [_variant(kernel, dtype, width, dropped, gated) for kernel in (norm_kernel, norm_backward_kernel)]


def _variant(kernel: Any, dtype: str, width: int, dropped: int, gated: bool) -> Variant:
    launch = _launch(width, dropped, gated)
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    constants = launch | ({} if gated else {"p_u": None}) | ({} if dropped else {"p_keys": None})
    types = {"p_keys": "*i64", "p_inverse": "*fp32", "num_rows": "i32", "eps": "fp32"}
    types |= dict.fromkeys(("p_a", "p_u", "p_y", "p_grad", "p_da", "p_du"), f"*{dtype}")
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
    name = f"{dtype} w={width}{' gated' if gated else ''}{' dropout' if dropped else ''}"
    return Variant(kernel, name, types, constants, num_warps, num_stages)
