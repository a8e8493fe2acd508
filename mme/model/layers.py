"""Layers with float32 weights that compute in the dtype of their input, `train.precision`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of layer norms


def make_linear(width: int, width_out: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and a bias of 0."""
    layer = nn.Linear(width, width_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """(…, width) → (…, width_out) in the dtype of ``x``."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """(…, width) → the same shape in the dtype of ``x``."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
