"""The blocks of SASRec, eSASRec (LiGR) and HSTU, the models that results are compared with.

`model.block` puts these blocks in place of the FuXi block, in the same decoder and over the same jagged tokens. Their
attention has no kernel: sequences of similar length are padded to chunks, and backward recomputes a chunk's (n, n) scores
instead of keeping them.

Legend: B sequences, N max_seq_len, T tokens, M views, d view width, H heads, G = M·H groups, S sequences of a chunk, n
the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.dropout import dropout
from kernels.relative_attention.reference import time_bucket
from kernels.splitmix import derive
from mme.model.biased_block import BiasedBlock
from mme.model.layers import EPS, layer_norm, linear, make_linear
from mme.model.moe import Routing
from mme.profiling.regions import region

ROWS_AT_ONCE = 32  # sequences in a chunk; more would add padding, fewer would add launches


class SoftmaxBlock(nn.Module):
    """Causal softmax attention over q·k / √dqk with dropout on its weights, the part that SASRec and LiGR share.

    Attributes:
        attention_norm, ffn_norm: layer norms of width d.
        qkv, output: linear layers d → H (2 dqk + dv) and H·dv → d.
    """

    def __init__(self, dim: int, num_heads: int, dqk: int, dv: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dqk, self.dv = num_heads, dqk, dv
        self.dropout = dropout
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.qkv = make_linear(dim, num_heads * (2 * dqk + dv))
        self.output = make_linear(num_heads * dv, dim)

    def attention(self, z: Tensor, seq_offsets: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """(M, T, d) → (M, T, d), the joined heads after the output layer."""
        heads = self.num_heads
        attention_keys = None
        if dropout_keys is not None:
            of_heads = torch.arange(heads, device=z.device)[:, None]
            attention_keys = derive(derive(dropout_keys, 0)[:, None], of_heads).flatten(0, 1)
        q, k, v = _heads(linear(z, self.qkv), heads, [self.dqk, self.dqk, self.dv])
        return linear(_join(attend_by_length(q, k, v, seq_offsets, self._attend, attention_keys), heads), self.output)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sequence: Tensor, keys: Tensor | None) -> Tensor:
        scores = (q @ k.transpose(1, 2)).float() / self.dqk**0.5
        shares = torch.softmax(scores.masked_fill(~_causal(scores), -torch.inf), dim=-1)
        return dropout(shares, self.dropout if self.training else 0.0, keys).to(v.dtype) @ v

    def _drop(self, x: Tensor, keys: Tensor | None, site: int) -> Tensor:
        if not self.training or not self.dropout:
            return x
        return dropout(x, self.dropout, None if keys is None else derive(keys, site))


class SASRecBlock(SoftmaxBlock):
    """x + dropout(Attention(LN(x))), then x + dropout(FFN(LN(x))) (SASRec, arXiv 1808.09781, equations 2 to 6).

    FFN(z) = dropout(ReLU(z W_1 + b_1)) W_2 + b_2. Unlike in the paper, there may be several heads; an output matrix joins them.

    Args:
        norm_first: otherwise LN(x + dropout(Attention(x))), then LN(x + dropout(FFN(x))), as in BERT and in RecBole's SASRec.
        attention_output_dropout: otherwise no dropout on the attention's output; the first public code has none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dqk: int,
        dv: int,
        hidden_dim: int,
        dropout: float = 0.0,
        norm_first: bool = True,
        attention_output_dropout: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, dqk, dv, dropout)
        self.norm_first, self.attention_output_dropout = norm_first, attention_output_dropout
        self.ffn_in, self.ffn_out = make_linear(dim, hidden_dim), make_linear(hidden_dim, dim)

    def forward(
        self,
        x: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor,
        plan: Any = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """(M, T, d) → (M, T, d) and no routing; ``seq_offsets`` (B + 1,) int64. Times and plan are not used.

        ``dropout_keys`` (M, T) int64: a random key for each row; required in training with dropout.
        """
        with region("attention"):
            z = layer_norm(x, self.attention_norm) if self.norm_first else x
            attended = self.attention(z, seq_offsets, dropout_keys)
            if self.attention_output_dropout:
                attended = self._drop(attended, dropout_keys, 1)
            x = x + attended
            if not self.norm_first:
                x = layer_norm(x, self.attention_norm)
        with region("experts"):
            z = layer_norm(x, self.ffn_norm) if self.norm_first else x
            hidden = self._drop(torch.relu(linear(z, self.ffn_in)), dropout_keys, 2)
            x = x + self._drop(linear(hidden, self.ffn_out), dropout_keys, 3)
            return x if self.norm_first else layer_norm(x, self.ffn_norm), None


class LiGRBlock(SoftmaxBlock):
    """x + σ(x G_a) ⊙ dropout(Attention(LN(x))), then x + σ(x G_f) ⊙ dropout(FFN(LN(x))).

    The block of eSASRec (arXiv 2508.06450), from LiGR (arXiv 2502.03417). FFN(z) = dropout(SiLU(z W_1) ⊙ (z W_3)) W_2; both
    gates and the layers of the FFN have biases.

    Attributes:
        ffn_in: the layers W_1 and W_3, one after the other, d → 2 f.
    """

    def __init__(self, dim: int, num_heads: int, dqk: int, dv: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads, dqk, dv, dropout)
        self.attention_gate, self.ffn_gate = make_linear(dim, dim), make_linear(dim, dim)
        self.ffn_in, self.ffn_out = make_linear(dim, 2 * hidden_dim), make_linear(hidden_dim, dim)

    def forward(
        self,
        x: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor,
        plan: Any = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """As `SASRecBlock.forward`."""
        with region("attention"):
            attended = self.attention(layer_norm(x, self.attention_norm), seq_offsets, dropout_keys)
            x = x + torch.sigmoid(linear(x, self.attention_gate)) * self._drop(attended, dropout_keys, 1)
        with region("experts"):
            inner, gate = linear(layer_norm(x, self.ffn_norm), self.ffn_in).chunk(2, dim=-1)
            hidden = self._drop(F.silu(inner) * gate, dropout_keys, 2)
            y = self._drop(linear(hidden, self.ffn_out), dropout_keys, 3)
            return x + torch.sigmoid(linear(x, self.ffn_gate)) * y, None


class HSTUBlock(BiasedBlock):
    """[u, v, q, k] = SiLU(norm(x) W_uvqk);  A = SiLU(q·k + bias) / N;  x' = dropout(u ⊙ norm(A v)) W_o + b_o + x.

    HSTU (arXiv 2402.17152, equations 1 to 3). The bias of (i, j) is w_pos[j − i + N − 1] + w_ts[bucket(τ_{i+1} − τ_j)],
    shared by the heads, with FuXi-α's buckets; norms are layer norms without scale.
    """

    def __init__(self, dim: int, max_seq_len: int, num_heads: int, dqk: int, dv: int, dropout: float = 0.0) -> None:
        super().__init__(dim, max_seq_len, num_heads, dqk, dv, channels=1, dropout=dropout)

    @region("attention")
    def forward(
        self,
        x: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor,
        plan: Any = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """(M, T, d) → (M, T, d) and no routing; ``timestamps`` (T + B,) int64 s, each sequence with one entry more.

        ``dropout_keys`` (M, T) int64: a random key for each row; required in training with dropout.
        """
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        projected = F.silu(normed @ self.uvqk.to(x.dtype))
        gate, rest = projected.split([self.num_heads * self.dv, projected.shape[-1] - self.num_heads * self.dv], dim=-1)
        v, q, k = _heads(rest, self.num_heads, [self.dv, self.dqk, self.dqk])

        def attend(q: Tensor, k: Tensor, v: Tensor, sequence: Tensor, keys: Tensor | None) -> Tensor:
            logits = (q @ k.transpose(1, 2)).float() + self._bias(sequence, q.shape[1], seq_offsets, timestamps)
            weights = F.silu(logits).masked_fill(~_causal(logits), 0) / self.max_seq_len
            return weights.to(v.dtype) @ v

        attended = _join(attend_by_length(q, k, v, seq_offsets, attend), self.num_heads)
        gated = gate * F.layer_norm(attended, attended.shape[-1:], eps=EPS)
        gated = dropout(gated, self.dropout if self.training else 0.0, dropout_keys)
        return linear(gated, self.output) + x, None

    def _bias(self, sequence: Tensor, n: int, seq_offsets: Tensor, timestamps: Tensor) -> Tensor:
        """(S, n, n) for the sequences of a chunk, (S,) int64."""
        position = torch.arange(n, device=timestamps.device)
        length = seq_offsets.diff()[sequence][:, None]
        start = (seq_offsets[sequence] + sequence)[:, None]  # a sequence of L tokens has L + 1 times
        times = timestamps[start + torch.minimum(position, length)]
        following = timestamps[start + torch.minimum(position + 1, length)]
        bucket = time_bucket(following[:, :, None] - times[:, None, :])
        distance = position[None, :] - position[:, None] + self.max_seq_len - 1
        return self.ts_weights[bucket] + self.pos_weights[distance]


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, attend: Attend, keys: Tensor | None = None
) -> Tensor:
    """Runs ``attend`` over padded chunks of sequences of similar length.

    Args:
        q, k: (G, T, dqk); v: (G, T, dv).
        seq_offsets: (B + 1,) int64.
        attend: maps a chunk's q, k (S, n, dqk), v (S, n, dv), the numbers of its sequences (S,) int64 and the keys of its
            rows, (S, n) int64 or None, to (S, n, dv). It must be causal, because the padding is at the end. S is at most
            the smaller of B and `ROWS_AT_ONCE`.
        keys: (G, T) int64, keys for the dropout of each query's weights; None: no dropout.

    Returns:
        (G, T, dv), without padding.
    """
    num_groups, num_tokens, _ = q.shape
    lengths = seq_offsets.diff()
    row_length = lengths.repeat(num_groups)
    sequence = torch.arange(lengths.numel(), device=q.device).repeat(num_groups)
    group_start = torch.arange(num_groups, device=q.device)[:, None] * num_tokens
    row_start = (seq_offsets[:-1] + group_start).flatten()
    order = torch.argsort(row_length, stable=True)
    order = order[row_length[order] > 0]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    keys = None if keys is None else keys.flatten()
    places, results = [], []
    for rows in order.split(max(1, min(lengths.numel(), ROWS_AT_ONCE))):
        longest = int(row_length[rows[-1]]) if rows.numel() else 0  # without tokens, every weight still gets a gradient
        position = torch.arange(longest, device=q.device)
        inside = position < row_length[rows][:, None]
        token = row_start[rows][:, None] + position.where(inside, 0)
        of_chunk = q[token], k[token], v[token], sequence[rows], None if keys is None else keys[token]
        y = checkpoint(attend, *of_chunk, use_reentrant=False, preserve_rng_state=False)
        places.append(token[inside])
        results.append(y[inside])
    result = torch.zeros_like(v).index_copy(0, torch.cat(places), torch.cat(results))
    return result.unflatten(0, (num_groups, num_tokens))


def _causal(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _heads(x: Tensor, num_heads: int, widths: list[int]) -> list[Tensor]:
    """(M, T, Σ H·width) → for each width (M·H, T, width)."""
    parts = x.split([num_heads * width for width in widths], dim=-1)
    return [part.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1) for part in parts]


def _join(x: Tensor, num_heads: int) -> Tensor:
    """(M·H, T, dv) → (M, T, H·dv)"""
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
