"""RMS normalisation with an optional gate and dropout, each direction in as few passes as PyTorch allows.

    y = dropout(u ⊙ a / √(mean(a²) + ε))        rms_norm: u = 1

    with r = 1 / √(mean(a²) + ε), â = a r and g the gradient after the dropout mask:
    d u = g ⊙ â,    d a = r (g ⊙ u − â mean(g ⊙ u ⊙ â))

Legend: R rows, w width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import require_torch_form

EPS = 1e-6


def gated_rms_norm(u: Tensor, a: Tensor, *, eps: float = EPS, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """dropout(u ⊙ RMSNorm(a)), no learned scale.

    Args:
        u, a: (R, w) of one dtype.
        dropout_p: probability of zero, in steps of 2⁻¹⁶; what stays is divided by the probability of staying. Drawn from
            torch's generator of the device. 0: no dropout.

    Returns:
        (R, w), differentiable in ``u`` and ``a``.

    Raises:
        ValueError: the shapes differ, ``dropout_p`` is outside [0, 1), or the backend cannot run here.
    """
    if u.shape != a.shape or a.dim() != 2:
        raise ValueError(f"u {tuple(u.shape)} and a {tuple(a.shape)} must have one shape (R, w)")
    return _norm(a, u, eps, dropout_p, backend)


def rms_norm(x: Tensor, *, eps: float = EPS, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """dropout(RMSNorm(x)) of (R, w), no learned scale; the arguments of `gated_rms_norm`."""
    return _norm(x, None, eps, dropout_p, backend)


def dropout_mask(shape: torch.Size, dropout_p: float, device: torch.device) -> tuple[Tensor, float]:
    """(mask of what stays, bool; the factor for it). Sixteen random bits an element, four elements a draw."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p ({dropout_p}) must be at least 0 and below 1")
    dropped = round(dropout_p * 65_536)
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = bits.view(torch.int16)[: shape.numel()].view(shape) >= dropped - 32_768
    return mask, 65_536 / (65_536 - dropped)


def _norm(a: Tensor, u: Tensor | None, eps: float, dropout_p: float, backend: str) -> Tensor:
    require_torch_form("rms_norm and gated_rms_norm", backend, a.device)
    mask, scale = dropout_mask(a.shape, dropout_p, a.device) if dropout_p else (None, 1.0)
    return _GatedRMSNorm.apply(a, u, mask, scale, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor | None, mask: Tensor | None, scale: float, eps: float) -> Tensor:
        wide = a.float() if a.dtype in (torch.float16, torch.bfloat16) else a
        mean_square = torch.linalg.vector_norm(wide, dim=1, keepdim=True).square_().div_(max(1, a.shape[1]))
        inverse = mean_square.add_(eps).rsqrt_()
        y = wide * (inverse * scale)
        if u is not None:
            y.mul_(u)
        if mask is not None:
            y.mul_(mask)
        ctx.save_for_backward(a, u, mask, inverse)
        ctx.scale = scale
        return y.to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, u, mask, inverse = ctx.saved_tensors
        normed = a * inverse
        grad = grad * ctx.scale if mask is None else (grad * mask).mul_(ctx.scale)
        grad_u = None
        if u is not None:
            grad_u = (grad * normed).to(u.dtype)
            grad = grad.mul_(u)
        mean = (grad * normed).mean(dim=1, keepdim=True)
        grad_a = grad.addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_a.to(a.dtype), grad_u, None, None, None
