"""Scores from hidden states and item rows.

The score of item i is Σ_m ⟨h_m, E_m[i]⟩ after the normalisation of both sides that `model.score_norm` names. It is always a
dot product of D-wide vectors, so ranking and losses need no case distinction.

Legend: M views, d view width, D = M·d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
VALUES_AT_ONCE = 1 << 16  # of each operand of backward on a CPU, so that they stay in a core's cache


def normalize_views(x: Tensor, score_norm: str) -> Tensor:
    """The vectors whose dot products are scores.

    Args:
        x: (..., M, d) the views of hidden states or of items.
        score_norm: "concat", the D-wide concatenation has length 1; "per_view", each view has length 1/√M, so that
            the dot product is the mean of the M cosines; "none", no normalisation.

    Returns:
        (..., D)
    """
    if score_norm == "none":
        return x.flatten(-2)
    if score_norm == "concat":
        return _with_length(x.flatten(-2), 1.0)
    return _with_length(x, x.shape[-2] ** -0.5).flatten(-2)


def _with_length(x: Tensor, length: float) -> Tensor:
    """(…, w) → the same shape, each row scaled to this length; rows shorter than `EPS` are divided by `EPS`."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Scaled.apply(x, length)
        return result
    unit = F.normalize(x, dim=-1, eps=EPS)
    return unit if length == 1.0 else unit * length


class _Scaled(torch.autograd.Function):
    """y = f x with f = length / max(|x|, ε) for each row. Then dx = f (g − x̂ ⟨x̂, g⟩) with x̂ = x / |x|, or f g below ε.

    It reads and writes a third of what autograd would through `F.normalize`, which takes twice as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: float) -> Tensor:
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factors = length / lengths.clamp(min=EPS)
        y = x * factors
        ctx.save_for_backward(y, factors, (factors / length**2).masked_fill_(lengths < EPS, 0))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, factors, along = ctx.saved_tensors
        grad = grad.contiguous()
        result = torch.empty_like(grad)
        at_once = max(1, VALUES_AT_ONCE // grad.shape[-1]) if grad.device.type == "cpu" else max(1, factors.numel())
        by_row = [of.reshape(-1, of.shape[-1]).split(at_once) for of in (y, grad, factors, along, result)]
        for y_part, grad_part, factor, scale, out in zip(*by_row, strict=True):
            torch.mul(grad_part, factor, out=out)
            out.addcmul_(y_part, (y_part * grad_part).sum(-1, keepdim=True).mul_(scale), value=-1)
        return result, None
