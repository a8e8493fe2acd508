"""The parameters that the FuXi and the HSTU block share, initialised as in the public FuXi-α code.

Legend: N max_seq_len, d view width, H heads.
"""

from __future__ import annotations

import torch
from torch import nn

from kernels.relative_attention.reference import NUM_TIME_BUCKETS


class BiasedBlock(nn.Module):
    """A block whose attention has learned weights by time bucket and by distance.

    Attributes:
        uvqk: (d, H · ((channels + 1) · dv + 2 · dqk)), the projection to the gate u, which is as wide as all channels, v, q, k.
        ts_weights: (129,), one weight per time bucket.
        pos_weights: (2N − 1,), one weight per distance.
        output: the linear layer from channels · H · dv back to d.
    """

    def __init__(
        self, dim: int, max_seq_len: int, num_heads: int, dqk: int, dv: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.max_seq_len, self.num_heads, self.dqk, self.dv = max_seq_len, num_heads, dqk, dv
        self.dropout = dropout
        self.uvqk = _normal(dim, num_heads * ((channels + 1) * dv + 2 * dqk))
        self.ts_weights = _normal(NUM_TIME_BUCKETS)
        self.pos_weights = _normal(2 * max_seq_len - 1)
        self.output = nn.Linear(channels * num_heads * dv, dim)
        nn.init.xavier_uniform_(self.output.weight)


def _normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=0.02))
