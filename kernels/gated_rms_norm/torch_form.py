"""The PyTorch form of the norms, which runs on CPUs and which the Triton kernels are tested against.

It keeps the dropout mask for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dropout import dropout_mask


def torch_norm(a: Tensor, u: Tensor | None, keys: Tensor | None, eps: float, dropped: int) -> Tensor:
    """`kernels.gated_rms_norm`, or without ``u`` `kernels.rms_norm`, after their checks; p is ``dropped`` / 2¹⁶."""
    mask, scale = (None, 1.0) if keys is None else dropout_mask(keys, a.shape[1], dropped)
    return _GatedRMSNorm.apply(a, u, mask, scale, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor | None, mask: Tensor | None, scale: float, eps: float) -> Tensor:
        wide = a.float() if a.dtype in (torch.float16, torch.bfloat16) else a
        mean_square = torch.linalg.vector_norm(wide, dim=1, keepdim=True).square_().div_(max(1, a.shape[1]))
        inverse = mean_square.add_(eps).rsqrt_()
        y = wide * (inverse * scale)
        if u is not None:
            y = y * u  # not in place, with which torch.compile of PyTorch 2.11 loses the gradient of a
        if mask is not None:
            y = y * mask
        ctx.save_for_backward(a, u, mask, inverse)
        ctx.scale = scale
        return y if y.dtype == a.dtype else y.to(a.dtype)

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
