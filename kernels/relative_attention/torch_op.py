"""The PyTorch form as an autograd function that shares a plan among calls, and as a custom operator for torch.compile.

Both compute in float64 for float64 operands and in float32 for all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import operator
from kernels.relative_attention import torch_form
from kernels.relative_attention.plan import TilePlan, make_tile_plan


class TiledAttention(torch.autograd.Function):
    """`torch_form.forward` and `torch_form.backward` with a given plan."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ts_weights: Tensor,
        pos_weights: Tensor,
        max_seq_len: int,
        plan: TilePlan,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, ts_weights, pos_weights)
        ctx.max_seq_len, ctx.plan = max_seq_len, plan
        return _forward((q, k, v, ts_weights, pos_weights), max_seq_len, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return *_backward(grad, ctx.saved_tensors, ctx.max_seq_len, ctx.plan), None, None


@operator("kernels::relative_attention_tiled")
def tiled_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    seq_offsets: Tensor,
    timestamps: Tensor,
    max_seq_len: int,
) -> Tensor:
    """The result (G, T, 3·dv). The operator makes its own plan in forward and again in backward."""
    plan = make_tile_plan(seq_offsets, timestamps)
    return _forward((q, k, v, ts_weights, pos_weights), max_seq_len, plan)


@tiled_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(v.shape[0], v.shape[1], 3 * v.shape[2])


@operator("kernels::relative_attention_tiled_backward")
def tiled_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    seq_offsets: Tensor,
    timestamps: Tensor,
    max_seq_len: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, ts_weights and pos_weights."""
    plan = make_tile_plan(seq_offsets, timestamps)
    return _backward(grad, (q, k, v, ts_weights, pos_weights), max_seq_len, plan)


@tiled_backward_op.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, ts_weights, pos_weights = (x.new_empty(x.shape) for x in inputs[:5])
    return q, k, v, ts_weights, pos_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_seq_len = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *tiled_backward_op(grad, *ctx.saved_tensors, ctx.max_seq_len), None, None, None


tiled_op.register_autograd(_differentiate, setup_context=_setup_context)


def _forward(operands: tuple[Tensor, ...], max_seq_len: int, plan: TilePlan) -> Tensor:
    return torch_form.forward(*_in_compute_dtype(*operands), max_seq_len, plan).to(operands[0].dtype)


def _backward(
    grad: Tensor, operands: tuple[Tensor, ...], max_seq_len: int, plan: TilePlan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    computed = _in_compute_dtype(*operands)
    gradients = torch_form.backward(grad.to(computed[0].dtype), *computed, max_seq_len, plan)
    dq, dk, dv, d_ts_weights, d_pos_weights = (g.to(x.dtype) for g, x in zip(gradients, operands, strict=True))
    return dq, dk, dv, d_ts_weights, d_pos_weights


def _in_compute_dtype(q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, ts_weights, pos_weights = (tensor.to(dtype) for tensor in others)
    return q.to(dtype), k, v, ts_weights, pos_weights
