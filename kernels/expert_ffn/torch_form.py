"""The PyTorch form of the expert FFN: the CPU's, and the twin that the Triton kernels are tested against.

One matrix product an expert and factor; only experts with rows are visited.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_expert_ffn(x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """`kernels.expert_ffn` after its checks."""
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
