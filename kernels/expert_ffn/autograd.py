"""Result shapes and autograd of the expert FFN's operators, the same for its PyTorch and its Triton form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def register_pair(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """``forward`` (x, expert_offsets, w1, w3, w2) → y, and ``backward`` (grad, the same) → gradients of x, w1, w3 and w2."""

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, *d_weights = backward(grad, *ctx.saved_tensors)
        return dx, None, *d_weights

    forward.register_fake(lambda x, *_: like(x))
    backward.register_fake(lambda grad, x, expert_offsets, *weights: tuple(like(tensor) for tensor in (x, *weights)))
    forward.register_autograd(differentiate, setup_context=save_inputs)


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def like(tensor: Tensor) -> Tensor:
    """Unwritten and contiguous, of the tensor's shape and dtype."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
