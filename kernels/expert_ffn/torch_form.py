"""The PyTorch form of the expert FFN, which runs on CPUs and which the Triton kernels are tested against.

It takes one matrix product per expert and factor and skips experts without rows.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import operator
from kernels.expert_ffn.autograd import like, register_pair


@operator("kernels::expert_ffn_torch")
def torch_expert_ffn(x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """`kernels.expert_ffn` after its checks."""
    y = like(x)
    for expert, rows in _segments(expert_offsets):
        hidden = F.silu(x[rows] @ w1[expert], inplace=True).mul_(x[rows] @ w3[expert])
        torch.mm(hidden, w2[expert], out=y[rows])
    return y


@operator("kernels::expert_ffn_torch_backward")
def torch_expert_ffn_backward(
    grad: Tensor, x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, w3 and w2."""
    grad = grad.contiguous()
    grad_x = like(x)
    grad_w1, grad_w3, grad_w2 = (like(weight).zero_() for weight in (w1, w3, w2))
    for expert, rows in _segments(expert_offsets):
        part = x[rows]
        first, gate = part @ w1[expert], part @ w3[expert]
        silu = F.silu(first)
        grad_hidden = grad[rows] @ w2[expert].T
        torch.mm((silu * gate).T, grad[rows], out=grad_w2[expert])
        grad_first = torch.ops.aten.silu_backward(grad_hidden * gate, first)
        grad_gate = grad_hidden.mul_(silu)
        torch.mm(part.T, grad_first, out=grad_w1[expert])
        torch.mm(part.T, grad_gate, out=grad_w3[expert])
        torch.mm(grad_first, w1[expert].T, out=grad_x[rows])
        grad_x[rows].addmm_(grad_gate, w3[expert].T)
    return grad_x, grad_w1, grad_w3, grad_w2


register_pair(torch_expert_ffn, torch_expert_ffn_backward)


def _segments(expert_offsets: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, each with the range of its rows."""
    pairs = enumerate(itertools.pairwise(expert_offsets.tolist()))
    return [(expert, slice(start, end)) for expert, (start, end) in pairs if end > start]
