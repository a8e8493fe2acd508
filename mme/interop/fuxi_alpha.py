"""Builds FuXi blocks from the weights of the public FuXi-α code (arXiv 2502.03036).

Public name → ours: `_uvqk` uvqk; `_rel_attn_bias._ts_w` ts_weights; `_rel_attn_bias._pos_w` pos_weights; `_mffn.lin0`
the output projection (W_0, b_0); `_mffn.lin1`, `lin3`, `lin2` the dense FFN's W_1, W_3, W_2, which torch's Linear stores
transposed.

Legend: B sequences, T tokens, d model width, f hidden width of the FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mme.model.fuxi_block import FuxiBlock
from mme.model.moe import DenseFFN


def block_from_public(params: Mapping[str, Any], *, max_seq_len: int, num_heads: int, dqk: int, dv: int) -> PublicBlock:
    """A FuXi block that computes with public weights, in eval mode without dropout.

    Args:
        params: arrays or tensors by public name, such as `_uvqk` (d, 3·H·dv + H·dv + 2·H·dqk). A tensor that requires
            a gradient is used directly and receives it; anything else becomes a parameter of that name.
        max_seq_len: the N of the position weights (2N − 1 entries) and of the semantic channel's scale 1 / N.

    Returns:
        A module, called as ``block(x, seq_offsets, timestamps)`` with x (T, d), seq_offsets (B + 1,) int64 and the
        jagged timestamps (T + B,) int64 seconds → (T, d). Its parameters have the public names.

    Raises:
        KeyError: a weight is missing.
    """
    return PublicBlock(params, max_seq_len, num_heads, dqk, dv).eval()


class PublicBlock(nn.Module):
    """`FuxiBlock` on weights with the public code's names and layout, so that gradients can be compared by name."""

    def __init__(self, params: Mapping[str, Any], max_seq_len: int, num_heads: int, dqk: int, dv: int) -> None:
        super().__init__()
        self.public = {name: _register(self, name, value) for name, value in params.items()}
        hidden_dim, dim = self.public["_mffn.lin1.weight"].shape
        # Each call replaces the block's weights, so they are not registered here.
        self._block = [FuxiBlock(dim, max_seq_len, num_heads, dqk, dv, DenseFFN(dim, hidden_dim)).eval()]

    def forward(self, x: Tensor, seq_offsets: Tensor, timestamps: Tensor) -> Tensor:
        public = self.public
        weights = {
            "uvqk": public["_uvqk"],
            "ts_weights": public["_rel_attn_bias._ts_w"],
            "pos_weights": public["_rel_attn_bias._pos_w"],
            "output.weight": public["_mffn.lin0.weight"],
            "output.bias": public["_mffn.lin0.bias"],
            "ffn.experts.w1": public["_mffn.lin1.weight"].T[None],
            "ffn.experts.w3": public["_mffn.lin3.weight"].T[None],
            "ffn.experts.w2": public["_mffn.lin2.weight"].T[None],
        }
        y, _ = functional_call(self._block[0], weights, (x[None], seq_offsets, timestamps))
        return y[0]


def _register(root: nn.Module, name: str, value: Any) -> Tensor:
    """Registers ``value`` under a dotted name and creates the modules in between."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    tensor = torch.as_tensor(value)
    if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
        module.register_buffer(leaf, tensor, persistent=False)
    else:
        tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.clone())
        module.register_parameter(leaf, tensor)
    return tensor
