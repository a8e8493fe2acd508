"""The Triton form of the expert FFN: launch configurations, custom operators and their autograd.

Legend: R rows, k choices of a row, d width, E experts, f hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import compute_capability, contiguous, dot_precision, operator
from kernels.expert_ffn import triton_kernels, triton_wide_kernels
from kernels.expert_ffn.autograd import like, register_pair, save_inputs

# Above these widths the tiles that fit on chip become so small that reading the weights again takes more memory traffic than
# writing and reading the hidden rows in two passes.
WIDEST_FORWARD, WIDEST_BACKWARD = 256, 128
WIDE_INNER = 32  # columns that the inner sum of the wide kernels takes at a time
PROGRAMS = 512  # of the kernel of the weights' gradients: several for each of the 132 processors of an H100


@dataclass(frozen=True)
class Tiles:
    """The launch of one kernel: ``block`` slots, ``step`` hidden units (or columns) at a time, and Triton's options."""

    block: int
    step: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        return {"BLOCK": self.block, "STEP": self.step, "num_warps": self.num_warps, "num_stages": self.num_stages}


SUM_TILES = Tiles(1024, 0, 4, 1)  # here a block is a range of elements of the weights


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched for one width and dtype.

    Attributes:
        forward: forward; in two passes, the hidden kernel in forward.
        rows: gradient of the rows; in two passes, the hidden kernel in backward.
        weights: gradients of the weights; in two passes, the outer products.
        product: only in two passes, the product with the hidden rows.
    """

    forward: Tiles
    rows: Tiles
    weights: Tiles
    product: Tiles

    @classmethod
    def choose(cls, dim: int, itemsize: int, precision: str, arch: int) -> LaunchConfig:
        """The launches for a GPU of compute capability ``arch``, such as 90.

        In bfloat16 each compiles without spilled registers and has few instructions per pair (`python -m kernels.aot`).
        """
        width = max(16, triton.next_power_of_2(dim))
        wide = WIDE_BF16 if itemsize == 2 else WIDE_FP32
        if itemsize == 4 and precision == "ieee":
            narrow, wide, width = TILES_RAGGED_EXACT if dim % 16 else TILES_EXACT, WIDE_EXACT, max(64, width)
        else:
            by_dtype = TILES_HOPPER if arch >= 90 else TILES_AMPERE
            ragged = width <= 256 and dim % 16 > 0
            narrow = by_dtype[("ragged " if ragged else "") + ("bf16" if itemsize == 2 else "fp32")]
            width = max(64, width) if ragged else width
        forward, rows, weights, *_ = narrow.get(width, wide)
        return cls(Tiles(*forward), Tiles(*rows), Tiles(*weights), Tiles(*wide[3]))


# By width: block, step, warps and stages of the three kernels. Hopper's tensor-core instruction takes 64 rows of four warps, so
# 8 warps need 128 rows; on 64, both halves would compute the same. Ampere's instruction takes 16 rows of one warp.
WIDE_BF16 = ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3), (128, 128, 8, 3))
WIDE_FP32 = ((128, 64, 8, 2), (64, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2))
WIDE_EXACT = (*WIDE_FP32[:2], (32, 64, 8, 2), WIDE_FP32[3])
TILES_HOPPER = {
    "bf16": {
        16: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
        32: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
        64: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1)),
        256: ((128, 32, 8, 2), *WIDE_BF16[1:3]),
    },
    "fp32": {
        16: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        32: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        64: ((128, 64, 8, 2), (128, 32, 8, 1), (64, 32, 4, 1)),
        128: ((128, 32, 8, 2), (64, 16, 4, 1), (32, 16, 4, 1)),
        256: ((32, 32, 8, 1), *WIDE_FP32[1:3]),
    },
    # Rows whose width is not a multiple of 16 are loaded element by element, each with its own address.
    "ragged bf16": {
        64: ((128, 64, 8, 2), (64, 32, 4, 1), (64, 32, 4, 1)),
        128: ((128, 32, 8, 1), (128, 16, 8, 1), (64, 16, 4, 1)),
        256: ((32, 16, 8, 1), *WIDE_FP32[1:3]),
    },
    "ragged fp32": {
        64: ((128, 64, 8, 2), (64, 16, 4, 1), (64, 32, 4, 1)),
        128: ((64, 16, 4, 1), (128, 16, 8, 1), (32, 16, 4, 1)),
        256: ((32, 16, 8, 1), *WIDE_FP32[1:3]),
    },
}
TILES_AMPERE = {
    "bf16": {
        16: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
        32: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        64: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        128: ((128, 32, 8, 2), (64, 32, 4, 2), (128, 16, 8, 1)),
        256: ((64, 32, 4, 2), *WIDE_BF16[1:3]),
    },
    "fp32": {
        16: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2)),
        32: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        64: ((128, 32, 8, 2), (64, 16, 8, 2), (64, 16, 4, 1)),
        128: ((128, 32, 8, 2), (32, 32, 8, 1), (64, 16, 8, 1)),
        256: ((32, 32, 8, 1), *WIDE_FP32[1:3]),
    },
    "ragged bf16": {
        64: ((128, 32, 8, 2), (64, 16, 4, 1), (64, 32, 4, 1)),
        128: ((64, 32, 4, 1), (128, 16, 8, 1), (64, 16, 4, 1)),
        256: ((32, 16, 8, 1), *WIDE_FP32[1:3]),
    },
    "ragged fp32": {
        64: ((128, 32, 8, 2), (64, 16, 4, 1), (64, 32, 4, 1)),
        128: ((64, 32, 4, 1), (64, 32, 8, 1), (32, 16, 4, 1)),
        256: ((32, 16, 8, 1), *WIDE_FP32[1:3]),
    },
}
# Exact float32 products run on vector units, which keep their operands in registers.
TILES_EXACT = {
    64: ((32, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
    128: ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    256: ((16, 16, 4, 1), *WIDE_EXACT[1:3]),
}
TILES_RAGGED_EXACT = TILES_EXACT | {64: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1))}


@dataclass(frozen=True)
class _Shape:
    """What all launches of one call share. A slot is a row or, with routing, one of its ``top_k`` choices."""

    num_slots: int
    top_k: int
    dim: int
    num_experts: int
    hidden_dim: int
    config: LaunchConfig
    constants: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, w1: Tensor, choice_weights: Tensor | None = None) -> _Shape:
        num_experts, dim, hidden_dim = w1.shape
        top_k = 0 if choice_weights is None else choice_weights.shape[1]
        precision = dot_precision(x.dtype)
        constants = {"EXPERTS": triton.next_power_of_2(num_experts), "PRECISION": precision}
        config = LaunchConfig.choose(dim, x.itemsize, precision, compute_capability(x.device))
        num_slots = x.shape[0] * max(1, top_k)
        return cls(num_slots, top_k, dim, num_experts, hidden_dim, config, constants)

    def nothing_to_do(self) -> bool:
        return 0 in (self.num_slots, self.dim, self.hidden_dim)

    def blocks(self, size: int) -> int:
        """An upper bound of the number of blocks, each of at most ``size`` slots of one expert, for any offsets."""
        return self.num_slots // size + min(self.num_experts, self.num_slots)

    def chunk(self, programs_of_a_chunk: int) -> int:
        """The number of slots whose weight gradients one program sums, small enough that the programs fill a GPU."""
        block = self.config.weights.block
        slots = triton.cdiv(self.num_slots * programs_of_a_chunk, PROGRAMS)
        return max(4 * block, triton.cdiv(slots, block) * block)


@operator("kernels::expert_ffn")
def expert_ffn_op(x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """`kernels.expert_ffn` after its checks."""
    x, expert_offsets, w1, w3, w2 = contiguous(x, expert_offsets, w1, w3, w2)
    shape = _Shape.of(x, w1)
    if shape.dim <= WIDEST_FORWARD:
        return _forward(shape, x, None, None, expert_offsets, w1, w3, w2)
    y = torch.empty_like(x)
    if shape.nothing_to_do():
        return y.zero_()
    hidden = x.new_empty(shape.num_slots, shape.hidden_dim)
    _hidden(shape, x, None, expert_offsets, w1, w3, w2, hidden, None, None)
    _product(shape, (hidden,), expert_offsets, (w2,), y, transposed=False)
    return y


@operator("kernels::expert_ffn_backward")
def expert_ffn_backward_op(
    grad: Tensor, x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, w3 and w2."""
    grad, x, expert_offsets, w1, w3, w2 = contiguous(grad, x, expert_offsets, w1, w3, w2)
    shape = _Shape.of(x, w1)
    if shape.dim <= WIDEST_BACKWARD:
        dx, _, (dw1, dw3, dw2) = _backward(shape, grad, x, None, None, expert_offsets, w1, w3, w2)
        return dx, dw1, dw3, dw2
    if shape.nothing_to_do():
        return torch.zeros_like(x), torch.zeros_like(w1), torch.zeros_like(w3), torch.zeros_like(w2)
    return _wide_backward(shape, grad, x, expert_offsets, w1, w3, w2)


register_pair(expert_ffn_op, expert_ffn_backward_op)


@operator("kernels::routed_expert_ffn")
def routed_expert_ffn_op(
    x: Tensor, order: Tensor, choice_weights: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> Tensor:
    """`kernels.routed_expert_ffn` after its checks, for d up to `WIDEST_BACKWARD`."""
    x, order, choice_weights, expert_offsets = contiguous(x, order, choice_weights, expert_offsets)
    w1, w3, w2 = contiguous(w1, w3, w2)
    shape = _Shape.of(x, w1, choice_weights)
    by_choice = _forward(shape, x, order, choice_weights, expert_offsets, w1, w3, w2)
    return by_choice.unflatten(0, choice_weights.shape).sum(1)


@routed_expert_ffn_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return like(x)


@operator("kernels::routed_expert_ffn_backward")
def routed_expert_ffn_backward_op(
    grad: Tensor,
    x: Tensor,
    order: Tensor,
    choice_weights: Tensor,
    expert_offsets: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, choice_weights, w1, w3 and w2."""
    grad, x, order, choice_weights, expert_offsets = contiguous(grad, x, order, choice_weights, expert_offsets)
    w1, w3, w2 = contiguous(w1, w3, w2)
    shape = _Shape.of(x, w1, choice_weights)
    dx, d_choice, (dw1, dw3, dw2) = _backward(shape, grad, x, order, choice_weights, expert_offsets, w1, w3, w2)
    return dx.unflatten(0, choice_weights.shape).sum(1), d_choice, dw1, dw3, dw2


@routed_expert_ffn_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, order: Tensor, choice_weights: Tensor, expert_offsets: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    return tuple(like(tensor) for tensor in (x, choice_weights, *weights))


def _differentiate_routed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_choice, *d_weights = routed_expert_ffn_backward_op(grad, *ctx.saved_tensors)
    return dx, None, d_choice, None, *d_weights


routed_expert_ffn_op.register_autograd(_differentiate_routed, setup_context=save_inputs)


def _forward(
    shape: _Shape,
    x: Tensor,
    order: Tensor | None,
    choice_weights: Tensor | None,
    offsets: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
) -> Tensor:
    """The results of the slots: (R, d) for rows, or with routing (R·k, d), weighted and in the order of the choices."""
    y = x.new_empty(shape.num_slots, shape.dim)
    if shape.nothing_to_do():
        return y.zero_()
    tiles = shape.config.forward
    triton_kernels.forward_kernel[(shape.blocks(tiles.block),)](
        x, y, order, choice_weights, offsets, w1, w3, w2, shape.num_experts, shape.hidden_dim,
        D=shape.dim, TOP_K=shape.top_k, **shape.constants, **tiles.launch(),
    )  # fmt: skip
    return y


def _backward(
    shape: _Shape,
    grad: Tensor,
    x: Tensor,
    order: Tensor | None,
    choice_weights: Tensor | None,
    offsets: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of the slots' rows, of choice_weights (empty without routing), and of w1, w3 and w2."""
    dx = x.new_empty(shape.num_slots, shape.dim)
    d_choice = torch.zeros_like(x[:0] if choice_weights is None else choice_weights, dtype=torch.float32)
    if shape.nothing_to_do():
        return dx.zero_(), d_choice, [torch.zeros_like(weight) for weight in (w1, w3, w2)]
    routing, weights, sizes = (order, choice_weights), (w1, w3, w2), (shape.num_experts, shape.hidden_dim)
    constants = {"D": shape.dim, "TOP_K": shape.top_k} | shape.constants
    tiles = shape.config.rows
    triton_kernels.backward_rows_kernel[(shape.blocks(tiles.block),)](
        x, grad, dx, d_choice, *routing, offsets, *weights, *sizes, **constants, **tiles.launch()
    )
    tiles = shape.config.weights
    num_steps = triton.cdiv(shape.hidden_dim, tiles.step)
    chunk = shape.chunk(num_steps)
    num_chunks = shape.blocks(chunk)
    partial = [weight.new_empty(num_chunks, weight[0].numel(), dtype=torch.float32) for weight in weights]
    triton_kernels.backward_weights_kernel[(num_chunks * num_steps,)](
        x, grad, *partial, *routing, offsets, *weights, *sizes, chunk, num_steps, **constants, **tiles.launch()
    )
    sums = [_sum_chunks(shape, part, offsets, chunk, weight) for part, weight in zip(partial, weights, strict=True)]
    return dx, d_choice, sums


def _wide_backward(
    shape: _Shape, grad: Tensor, x: Tensor, offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    hidden, da, db = (x.new_empty(shape.num_slots, shape.hidden_dim) for _ in range(3))
    _hidden(shape, x, grad, offsets, w1, w3, w2, hidden, da, db)
    _product(shape, (da, db), offsets, (w1, w3), dx, transposed=True)
    dw1, dw3 = _outer(shape, x, da, offsets, w1), _outer(shape, x, db, offsets, w3)
    return dx, dw1, dw3, _outer(shape, hidden, grad, offsets, w2)


def _hidden(
    shape: _Shape,
    x: Tensor,
    grad: Tensor | None,
    offsets: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    hidden: Tensor,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    tiles = shape.config.forward if grad is None else shape.config.rows
    num_steps = triton.cdiv(shape.hidden_dim, tiles.step)
    triton_wide_kernels.hidden_kernel[(shape.blocks(tiles.block) * num_steps,)](
        x, grad, hidden, da, db, offsets, w1, w3, w2, shape.num_experts, shape.hidden_dim, num_steps,
        D=shape.dim, INNER=WIDE_INNER, BACKWARD=grad is not None, **shape.constants, **tiles.launch(),
    )  # fmt: skip


def _product(
    shape: _Shape,
    left: tuple[Tensor, ...],
    offsets: Tensor,
    right: tuple[Tensor, ...],
    out: Tensor,
    transposed: bool,
) -> None:
    tiles = shape.config.product
    inner_stride, out_stride = right[0].stride()[1:]
    if transposed:
        inner_stride, out_stride = out_stride, inner_stride
    num_steps = triton.cdiv(out.shape[1], tiles.step)
    triton_wide_kernels.product_kernel[(shape.blocks(tiles.block) * num_steps,)](
        left[0], left[-1], out, offsets, right[0], right[-1], shape.num_experts, left[0].shape[1], out.shape[1],
        inner_stride, out_stride, num_steps, INNER=WIDE_INNER, PAIR=len(left) == 2, **shape.constants, **tiles.launch(),
    )  # fmt: skip


def _outer(shape: _Shape, left: Tensor, right: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    tiles = shape.config.weights
    left_steps, right_steps = (triton.cdiv(factor.shape[1], tiles.step) for factor in (left, right))
    chunk = shape.chunk(left_steps * right_steps)
    num_chunks = shape.blocks(chunk)
    partial = weight.new_empty(num_chunks, weight[0].numel(), dtype=torch.float32)
    triton_wide_kernels.outer_kernel[(num_chunks * left_steps * right_steps,)](
        left, right, partial, offsets, shape.num_experts, left.shape[1], right.shape[1], chunk, left_steps, right_steps,
        **shape.constants, **tiles.launch(),
    )  # fmt: skip
    return _sum_chunks(shape, partial, offsets, chunk, weight)


def _sum_chunks(shape: _Shape, partial: Tensor, offsets: Tensor, chunk: int, weight: Tensor) -> Tensor:
    total = torch.empty_like(weight)
    size = weight[0].numel()
    num_parts = triton.cdiv(size, SUM_TILES.block)
    triton_kernels.sum_chunks_kernel[(shape.num_experts * num_parts,)](
        partial, total, offsets, shape.num_experts, size, chunk, num_parts,
        EXPERTS=shape.constants["EXPERTS"], BLOCK=SUM_TILES.block, num_warps=SUM_TILES.num_warps,
        num_stages=SUM_TILES.num_stages,
    )  # fmt: skip
    return total
