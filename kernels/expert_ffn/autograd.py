"""Result shapes and autograd of the expert FFN's operators, shared by the PyTorch and the Triton form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def register_pair(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Registers ``backward`` as the gradient of ``forward``, and the result shapes of both.

    Args:
        forward: (x, expert_offsets, w1, w3, w2) → y.
        backward: (grad, x, expert_offsets, w1, w3, w2) → the gradients of x, w1, w3 and w2.
    """

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, *d_weights = backward(grad, *ctx.saved_tensors)
        return dx, None, *d_weights

    forward.register_fake(lambda x, *_: like(x))
    backward.register_fake(lambda grad, x, expert_offsets, *weights: tuple(like(tensor) for tensor in (x, *weights)))
    forward.register_autograd(differentiate, setup_context=save_inputs)


def save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def like(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor with the shape, dtype and device of ``tensor``."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
