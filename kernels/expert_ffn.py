"""Gated feed-forward networks of E experts over rows sorted by expert.

    y = (SiLU(x W_1) ⊙ (x W_3)) W_2        with the weights of the row's expert

    with s = SiLU(x W_1), b = x W_3, h = s ⊙ b and d h = dy W_2ᵀ:
    d W_2 = hᵀ dy,  d b = d h ⊙ s,  d (x W_1) = d h ⊙ b ⊙ SiLU'(x W_1),  d x = d(x W_1) W_1ᵀ + d b W_3ᵀ

Backward computes x W_1 and x W_3 again, so that only x is kept: the hidden rows are f / d times larger.

Legend: R rows, d width, E experts, f hidden width.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import require_torch_form


def expert_ffn(
    x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *, backend: str = "auto"
) -> Tensor:
    """The FFN of each row's expert.

    Args:
        x: (R, d), sorted by expert.
        expert_offsets: (E + 1,) int64; expert e has the rows [expert_offsets[e], expert_offsets[e + 1]), maybe none.
            Counts [2, 0, 3] → [0, 2, 2, 5].
        w1, w3: (E, d, f). w2: (E, f, d).

    Returns:
        (R, d), differentiable in ``x`` and the weights.

    Raises:
        ValueError: a shape does not fit, or the backend cannot run here.
    """
    num_experts = expert_offsets.numel() - 1
    if x.dim() != 2 or w1.dim() != 3 or w1.shape[:2] != (num_experts, x.shape[1]):
        raise ValueError(
            f"w1 has shape {tuple(w1.shape)}, expected ({num_experts}, {x.shape[-1]}, f) for x and offsets"
        )
    if w3.shape != w1.shape:
        raise ValueError(f"w3 has shape {tuple(w3.shape)}, expected that of w1, {tuple(w1.shape)}")
    if w2.shape != (num_experts, w1.shape[2], x.shape[1]):
        raise ValueError(f"w2 has shape {tuple(w2.shape)}, expected {(num_experts, w1.shape[2], x.shape[1])}")
    require_torch_form("expert_ffn", backend, x.device)
    return _ExpertFFN.apply(x, expert_offsets, w1, w3, w2)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        bounds = expert_offsets.tolist()
        y = torch.empty_like(x)
        for expert, rows in _segments(bounds):
            hidden = F.silu(x[rows] @ w1[expert], inplace=True).mul_(x[rows] @ w3[expert])
            torch.mm(hidden, w2[expert], out=y[rows])
        ctx.save_for_backward(x, w1, w3, w2)
        ctx.bounds = bounds
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w3, w2 = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        grad_w1, grad_w3, grad_w2 = torch.zeros_like(w1), torch.zeros_like(w3), torch.zeros_like(w2)
        for expert, rows in _segments(ctx.bounds):
            part = x[rows]
            first, gate = part @ w1[expert], part @ w3[expert]
            sigmoid = torch.sigmoid(first)
            silu = first.mul_(sigmoid)
            slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
            grad_hidden = grad[rows] @ w2[expert].T
            torch.mm((silu * gate).T, grad[rows], out=grad_w2[expert])
            grad_first = slope.mul_(gate).mul_(grad_hidden)
            grad_gate = grad_hidden.mul_(silu)
            torch.mm(part.T, grad_first, out=grad_w1[expert])
            torch.mm(part.T, grad_gate, out=grad_w3[expert])
            torch.mm(grad_first, w1[expert].T, out=grad_x[rows])
            grad_x[rows].addmm_(grad_gate, w3[expert].T)
        return grad_x, None, grad_w1, grad_w3, grad_w2


def _segments(bounds: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    pairs = enumerate(itertools.pairwise(bounds))
    return [(expert, slice(start, end)) for expert, (start, end) in pairs if end > start]
