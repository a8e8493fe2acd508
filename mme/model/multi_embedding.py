"""From item rows to the M input views of a batch of sequences.

X_m = √D · E_m[item] + pos_m[t], then dropout (Fuxi-MME, arXiv 2510.25285; FuXi-α, arXiv 2502.03036, for M = 1).

Legend: B sequences, N max_seq_len, T tokens, M views, d view width, D = M·d, U distinct items of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dropout import dropout


class InputViews(nn.Module):
    """Scales the item rows, adds a learned position to each view and drops out."""

    def __init__(self, num_views: int, view_dim: int, max_seq_len: int, dropout: float, positions: str) -> None:
        """``positions``: "per_view", a position vector for each view; "shared", one for all."""
        super().__init__()
        self.scale = (num_views * view_dim) ** 0.5
        self.dropout = dropout
        self.positions = nn.Parameter(torch.empty(num_views if positions == "per_view" else 1, max_seq_len, view_dim))
        std = 1.0 / self.scale
        nn.init.trunc_normal_(self.positions, std=std, a=-2 * std, b=2 * std)

    def forward(self, item_rows: Tensor, item_index: Tensor, seq_offsets: Tensor) -> Tensor:
        """
        Args:
            item_rows: (U, M, d) the rows of the batch's distinct items in the M tables.
            item_index: (T,) int64, the row in ``item_rows`` of each token.
            seq_offsets: (B + 1,) int64.

        Returns:
            (M, T, d)
        """
        _, num_views, view_dim = item_rows.shape
        tokens = F.embedding(item_index, item_rows.flatten(1)).unflatten(1, (num_views, view_dim))
        position = positions_in_sequence(seq_offsets, item_index.numel())
        shared = self.positions.transpose(0, 1).reshape(self.positions.shape[1], -1)
        added = F.embedding(position, shared).unflatten(1, (self.positions.shape[0], view_dim))
        views = torch.add(added, tokens, alpha=self.scale).transpose(0, 1)
        return dropout(views, self.dropout) if self.training else views


def positions_in_sequence(seq_offsets: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: the place of each token in its own sequence; lengths [2, 0, 3] → [0, 1, 0, 1, 2]."""
    lengths = seq_offsets.diff()
    starts = torch.repeat_interleave(seq_offsets[:-1], lengths, output_size=num_tokens)
    return torch.arange(num_tokens, device=seq_offsets.device) - starts
