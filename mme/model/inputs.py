"""The M input views of a batch of sequences, made from rows of the tables.

X_m = √D · E_m[item] + pos_m[t], then dropout (Fuxi-MME, arXiv 2510.25285; FuXi-α, arXiv 2502.03036, for M = 1). The
features of an event are added to its item: √D · (E_m[item] + Σ_f E_m[value of f]). The features of a user sum to a token
before the history.

Legend: B sequences, N max_seq_len, T tokens, M views, d view width, D = M·d, U distinct rows of a batch, F event features,
G user features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dropout import dropout


@dataclass(frozen=True)
class UserTokens:
    """B sequences, each with a token of its user in front, T + B tokens in total.

    Worked example, lengths [2, 0, 3]: seq_offsets [0, 3, 4, 8], item_places [1, 2, 5, 6, 7].

    Attributes:
        seq_offsets: (B + 1,) int64, with the user's tokens.
        timestamps: (T + 2B,) int64; the first time of each sequence occurs twice, because the user's token has it too.
        item_places: (T,) int64, the positions of item tokens.
    """

    seq_offsets: Tensor
    timestamps: Tensor
    item_places: Tensor

    @classmethod
    def before(cls, seq_offsets: Tensor, timestamps: Tensor, num_tokens: int) -> UserTokens:
        """Puts a user's token in front of each sequence."""
        num_sequences = seq_offsets.numel() - 1
        number = torch.arange(num_sequences + 1, device=seq_offsets.device)
        repeats = torch.ones_like(timestamps)
        repeats[seq_offsets[:-1] + number[:-1]] = 2
        sequence = torch.repeat_interleave(number[:-1], seq_offsets.diff(), output_size=num_tokens)
        return cls(
            seq_offsets + number,
            torch.repeat_interleave(timestamps, repeats, output_size=timestamps.numel() + num_sequences),
            torch.arange(num_tokens, device=seq_offsets.device) + sequence + 1,
        )


class InputViews(nn.Module):
    """Scales the sum of each token's rows, adds a learned position to each view and applies dropout."""

    def __init__(
        self,
        num_views: int,
        view_dim: int,
        max_seq_len: int,
        dropout: float,
        positions: str,
        positions_from: str = "oldest",
    ) -> None:
        """
        Args:
            positions: "per_view" for a position vector per view, "shared" for one for all views.
            positions_from: "oldest", the oldest token has position 0; "newest", the newest has position N − 1.
        """
        super().__init__()
        self.scale = (num_views * view_dim) ** 0.5
        self.dropout = dropout
        self.from_newest = positions_from == "newest"
        self.positions = nn.Parameter(torch.empty(num_views if positions == "per_view" else 1, max_seq_len, view_dim))
        std = 1.0 / self.scale
        nn.init.trunc_normal_(self.positions, std=std, a=-2 * std, b=2 * std)

    def forward(
        self,
        item_rows: Tensor,
        item_index: Tensor,
        seq_offsets: Tensor,
        event_index: Tensor | None = None,
        user_index: Tensor | None = None,
        user_tokens: UserTokens | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            item_rows: (U, M, d) the rows of the batch's distinct items and features in the M tables.
            item_index: (T,) int64, the row in ``item_rows`` of each token.
            seq_offsets: (B + 1,) int64; with ``user_tokens``, its ``seq_offsets``.
            event_index: (T, F) int64, the rows of each token's event features.
            user_index: (B, G) int64, the rows of each user's features; ``user_tokens`` gives the positions of their tokens.
            dropout_keys: (M, T) int64, or (M, T + B) with users' tokens, see `kernels.dropout`; only for training.

        Returns:
            (M, T, d), or (M, T + B, d) with users' tokens.
        """
        _, num_views, view_dim = item_rows.shape
        rows = item_rows.flatten(1)
        events = item_index[:, None] if event_index is None else torch.cat([item_index[:, None], event_index], 1)
        sums = _sum_of_rows(rows, events)
        if user_index is not None and user_tokens is not None:
            users = _sum_of_rows(rows, user_index)
            whole = sums.new_empty(len(sums) + len(users), rows.shape[1])
            sums = whole.index_copy(0, user_tokens.item_places, sums).index_copy(0, seq_offsets[:-1], users)
        tokens = sums.unflatten(1, (num_views, view_dim))
        position = positions_in_sequence(seq_offsets, len(tokens))
        if self.from_newest:
            lengths = torch.repeat_interleave(seq_offsets.diff(), seq_offsets.diff(), output_size=len(tokens))
            position = position + self.positions.shape[1] - lengths
        shared = self.positions.transpose(0, 1).reshape(self.positions.shape[1], -1)
        added = F.embedding(position, shared).unflatten(1, (self.positions.shape[0], view_dim))
        views = torch.add(added, tokens, alpha=self.scale).transpose(0, 1)
        return dropout(views, self.dropout if self.training else 0.0, dropout_keys)


def _sum_of_rows(rows: Tensor, index: Tensor) -> Tensor:
    """(T, D) sums of K rows each: ``rows`` (U, D) at the indices in ``index`` (T, K)."""
    return reduce(torch.add, (F.embedding(column, rows) for column in index.unbind(1)))


def positions_in_sequence(seq_offsets: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64 position of each token in its sequence; lengths [2, 0, 3] → [0, 1, 0, 1, 2]."""
    lengths = seq_offsets.diff()
    starts = torch.repeat_interleave(seq_offsets[:-1], lengths, output_size=num_tokens)
    return torch.arange(num_tokens, device=seq_offsets.device) - starts
