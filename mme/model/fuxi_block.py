"""One FuXi block over all views of a batch (FuXi-α, arXiv 2502.03036; the FFN may be a mixture of experts).

    x̂ = RMSNorm(x);  [u, v, q, k] = SiLU(x̂ W_uvqk)
    a = concat over heads of (P v, T v, A v): positional, temporal and semantic channel (`kernels.relative_attention`)
    o = dropout(u ⊙ RMSNorm(a)) W_0 + b_0 + x
    x' = FFN(dropout(RMSNorm(o))) + o

Legend: B sequences, N max_seq_len, T tokens, M views, d view width, H heads, G = M·H groups, R = M·T rows.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels import gated_rms_norm, relative_attention, rms_norm, silu_split
from kernels.splitmix import derive
from mme.model.biased_block import BiasedBlock
from mme.model.moe import DenseFFN, MixtureOfExperts, Routing
from mme.profiling.regions import region


class FuxiBlock(BiasedBlock):
    """The block as the public FuXi-α code initialises it; ``ffn`` is a DenseFFN or a MixtureOfExperts of width d."""

    def __init__(
        self,
        dim: int,
        max_seq_len: int,
        num_heads: int,
        dqk: int,
        dv: int,
        ffn: DenseFFN | MixtureOfExperts,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, max_seq_len, num_heads, dqk, dv, channels=3, dropout=dropout)
        self.backend = backend
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor,
        plan: Any = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """
        Args:
            x: (M, T, d) the views of T jagged tokens.
            seq_offsets: (B + 1,) int64.
            timestamps: (T + B,) int64 seconds, each sequence with one entry more than its length.
            plan: the result of `kernels.plan_attention` for these offsets and timestamps; None: computed here.
            dropout_keys: (M, T) int64, a random key for each row; required in training with dropout.

        Returns:
            (M, T, d) and, if the FFN has experts, the routing of its R = M·T rows.
        """
        num_views, num_tokens, dim = x.shape
        dropout = self.dropout if self.training else 0.0
        with region("attention"):
            gate_keys = ffn_keys = None
            if dropout and dropout_keys is not None:
                gate_keys, ffn_keys = (derive(dropout_keys.flatten(), site) for site in (0, 1))
            rows = x.reshape(-1, dim)
            normed = rms_norm(rows, backend=self.backend)
            projected = normed @ self.uvqk.to(rows.dtype)
            u, v, q, k = silu_split(projected, num_views, self.num_heads, self.dv, self.dqk, backend=self.backend)
            attended = relative_attention(
                q,
                k,
                v,
                seq_offsets,
                self.max_seq_len,
                timestamps,
                self.ts_weights,
                self.pos_weights,
                backend=self.backend,
                plan=plan,
            )
            attended = attended.unflatten(0, (num_views, self.num_heads)).transpose(1, 2).flatten(2).flatten(0, 1)
            gated = gated_rms_norm(u, attended, dropout_p=dropout, dropout_keys=gate_keys, backend=self.backend)
            o = F.linear(gated, self.output.weight.to(rows.dtype), self.output.bias.to(rows.dtype)) + rows
            z = rms_norm(o, dropout_p=dropout, dropout_keys=ffn_keys, backend=self.backend)
        y, routing = self.ffn(z, num_views)
        with region("experts"):
            return (y + o).view(num_views, num_tokens, dim), routing
