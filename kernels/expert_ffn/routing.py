"""Copies rows in the order of their experts and sums the results by row. Both directions only gather, without atomics.

Legend: R rows, k choices of a row, d width. Choice c = row · k + j; order (R·k,) lists the choices by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sorted_copies(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x (R, d) → (S, d), with row order[i] // k at i. ``order`` may omit choices, so S ≤ R·k."""
    return _SortedCopies.apply(x, order, top_k)


def weighted_choices(results: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """results (R·k, d) in ``order``, weights (R, k) → (R, d), the weighted sum of each row's k results."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    by_row = _Permute.apply(results, place, order).unflatten(0, weights.shape)
    return torch.einsum("rk,rkd->rd", weights.to(results.dtype), by_row)


class _SortedCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_rows, ctx.top_k = x.shape[0], top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        by_choice = grad.new_zeros(ctx.num_rows * ctx.top_k, grad.shape[1]).index_copy_(0, order, grad)
        return by_choice.unflatten(0, (ctx.num_rows, ctx.top_k)).sum(1), None, None


class _Permute(torch.autograd.Function):
    """Permutes rows by ``place``. Backward gathers by the ``inverse`` permutation instead of scattering by ``place``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
