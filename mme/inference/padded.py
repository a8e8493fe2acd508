"""The encoder over padded histories, in operators that `torch.export` and AOTInductor take: fixed control flow, no kernels.

    items (B, L), lengths (B,), timestamps (B, L + 1), events (B, L, F), users (B, G)  →  states (B, D) float32

It computes what `mme.model.decoder.Decoder` computes without dropout, from the same weights, for any B and any L ≥ 2. Padding is
at the end of each row, so causal attention hides it from all tokens.

Legend: B histories, L longest of them, N max_seq_len, M views, d view width, D = M·d, H heads, R rows (M·B·L), E experts, k top_k,
f hidden width, F event and G user features.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.relative_attention.reference import NUM_TIME_BUCKETS
from kernels.relative_attention.time_tables import time_thresholds
from mme.config import Config
from mme.model.baselines import HSTUBlock, LiGRBlock, SASRecBlock, SoftmaxBlock
from mme.model.decoder import Decoder
from mme.model.feature_rows import FeatureRows
from mme.model.fuxi_block import FuxiBlock
from mme.model.inputs import InputViews
from mme.model.layers import layer_norm, linear
from mme.model.moe import DenseFFN, GatedExperts, MixtureOfExperts
from mme.model.scoring import normalize_views

NORM_EPS = 1e-6
ROWS_OF_A_TILE = 32  # rows of one expert that are multiplied together


class PaddedEncoder(nn.Module):
    """
    Args:
        decoder: trained, in evaluation mode.
        tables: (rows, M, d) float32, see `mme.model.feature_rows`.
        rows: maps items and feature values to rows of the tables.
    """

    tables: Tensor
    event_firsts: Tensor
    user_firsts: Tensor
    thresholds: Tensor

    def __init__(self, config: Config, decoder: Decoder, tables: Tensor, rows: FeatureRows) -> None:
        super().__init__()
        self.model, self.max_seq_len = config.model, config.data.max_seq_len
        self.decoder = decoder
        self.register_buffer("tables", tables)
        firsts = torch.tensor(rows.firsts, device=tables.device)
        self.register_buffer("event_firsts", firsts[: rows.num_event_features])
        self.register_buffer("user_firsts", firsts[rows.num_event_features :])
        self.register_buffer("thresholds", time_thresholds(torch.device("cpu")).to(tables.device))

    def forward(
        self,
        items: Tensor,
        lengths: Tensor,
        timestamps: Tensor,
        events: Tensor | None = None,
        users: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            items: (B, L) int64 item indices, oldest first; any index where a row is padded.
            lengths: (B,) int64 from 1 to L.
            timestamps: (B, L + 1) int64 seconds: of the events, then of the request at place ``lengths[b]``; any after it.
            events: (B, L, F) int64, numbers of the values of `model.event_features`, 0 for a missing one.
            users: (B, G) int64, those of `model.user_features`.

        Returns:
            (B, D) float32 normalised states; the score of an item is the dot product with its vector.
        """
        return normalize_views(self.hidden(items, lengths, timestamps, events, users), self.model.score_norm)

    def hidden(
        self,
        items: Tensor,
        lengths: Tensor,
        timestamps: Tensor,
        events: Tensor | None = None,
        users: Tensor | None = None,
    ) -> Tensor:
        """(B, M, d) float32, the states before normalisation; arguments as for `forward`."""
        views = self._embed(items, events)
        if users is not None:
            token = self._sum_of_rows(users + self.user_firsts)[:, :, None]
            views = torch.cat([token, views], dim=2)
            timestamps = torch.cat([timestamps[:, :1], timestamps], dim=1)
            lengths = lengths + 1
        inputs: InputViews = self.decoder.inputs
        place = torch.arange(views.shape[2], device=views.device)  # a slice would fix whether L is N when it is traced
        if inputs.from_newest:
            of_token = (place + self.max_seq_len - lengths[:, None]).clamp(max=self.max_seq_len - 1)
            positions = inputs.positions[:, of_token]
        else:
            positions = inputs.positions.index_select(1, place)[:, None]
        x = views * inputs.scale + positions
        for block in self.decoder.blocks:
            x = self._block(block, x, timestamps)
        if self.decoder.final_norm is not None:
            x = layer_norm(x, self.decoder.final_norm)
        last = x[:, torch.arange(lengths.shape[0], device=x.device), lengths - 1]
        return last.transpose(0, 1)

    def _embed(self, items: Tensor, events: Tensor | None) -> Tensor:
        """(M, B, L, d)"""
        index = items[:, :, None]
        if events is not None:
            index = torch.cat([index, events + self.event_firsts], dim=2)
        return self._sum_of_rows(index)

    def _sum_of_rows(self, index: Tensor) -> Tensor:
        """(…, K) int64 rows of the tables → (M, …, d)"""
        tables = self.tables.flatten(1)
        sums = reduce(torch.add, (F.embedding(column, tables) for column in index.unbind(-1)))
        return sums.unflatten(-1, (self.model.num_tables, -1)).movedim(-2, 0)

    def _block(self, block: nn.Module, x: Tensor, timestamps: Tensor) -> Tensor:
        """(M, B, L, d) → (M, B, L, d)"""
        if isinstance(block, FuxiBlock):
            return self._fuxi(block, x, timestamps)
        if isinstance(block, HSTUBlock):
            return self._hstu(block, x, timestamps)
        if isinstance(block, LiGRBlock):
            return _ligr(block, x)
        assert isinstance(block, SASRecBlock)
        return _sasrec(block, x)

    def _fuxi(self, block: FuxiBlock, x: Tensor, timestamps: Tensor) -> Tensor:
        heads, dv, dqk = block.num_heads, block.dv, block.dqk
        projected = F.silu(_rms_norm(x) @ block.uvqk)
        u, v, q, k = projected.split([3 * heads * dv, heads * dv, heads * dqk, heads * dqk], dim=-1)
        v, q, k = (_by_head(part, heads) for part in (v, q, k))
        temporal, positional = self._biases(block, timestamps)
        semantic = _causal(F.silu(q @ k.transpose(-1, -2))) / self.max_seq_len
        channels = [_causal(positional) @ v, _causal(temporal)[:, None] @ v, semantic @ v]
        gated = u * _rms_norm(_join(torch.cat(channels, dim=-1)))
        o = F.linear(gated, block.output.weight, block.output.bias) + x
        z = _rms_norm(o)
        if isinstance(block.ffn, DenseFFN):
            return _gated_ffn(z, block.ffn.experts) + o
        return _mixture(z.flatten(1, 2), block.ffn).unflatten(1, (z.shape[1], z.shape[2])) + o

    def _hstu(self, block: HSTUBlock, x: Tensor, timestamps: Tensor) -> Tensor:
        heads, dv, dqk = block.num_heads, block.dv, block.dqk
        projected = F.silu(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) @ block.uvqk)
        u, v, q, k = projected.split([heads * dv, heads * dv, heads * dqk, heads * dqk], dim=-1)
        v, q, k = (_by_head(part, heads) for part in (v, q, k))
        temporal, positional = self._biases(block, timestamps)
        weights = _causal(F.silu(q @ k.transpose(-1, -2) + temporal[:, None] + positional)) / self.max_seq_len
        attended = _join(weights @ v)
        gated = u * F.layer_norm(attended, attended.shape[-1:], eps=NORM_EPS)
        return F.linear(gated, block.output.weight, block.output.bias) + x

    def _biases(self, block: FuxiBlock | HSTUBlock, timestamps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, L) weights of the time from each key to the query's next event, and (L, L) of the distance."""
        gaps = (timestamps[:, 1:, None] - timestamps[:, None, :-1]).abs().to(torch.float32)
        bucket = (torch.bucketize(gaps, self.thresholds, right=True) - 1).clamp(0, NUM_TIME_BUCKETS - 1)
        place = torch.arange(gaps.shape[1], device=gaps.device)
        distance = place[None, :] - place[:, None] + self.max_seq_len - 1
        return block.ts_weights[bucket], block.pos_weights[distance]


def _sasrec(block: SASRecBlock, x: Tensor) -> Tensor:
    first = block.norm_first
    x = x + _softmax_attention(block, layer_norm(x, block.attention_norm) if first else x)
    if not first:
        x = layer_norm(x, block.attention_norm)
    hidden = torch.relu(linear(layer_norm(x, block.ffn_norm) if first else x, block.ffn_in))
    x = x + linear(hidden, block.ffn_out)
    return x if first else layer_norm(x, block.ffn_norm)


def _ligr(block: LiGRBlock, x: Tensor) -> Tensor:
    attended = _softmax_attention(block, layer_norm(x, block.attention_norm))
    x = x + torch.sigmoid(linear(x, block.attention_gate)) * attended
    inner, gate = linear(layer_norm(x, block.ffn_norm), block.ffn_in).chunk(2, dim=-1)
    return x + torch.sigmoid(linear(x, block.ffn_gate)) * linear(F.silu(inner) * gate, block.ffn_out)


def _softmax_attention(block: SoftmaxBlock, z: Tensor) -> Tensor:
    heads, dv, dqk = block.num_heads, block.dv, block.dqk
    parts = linear(z, block.qkv).split([heads * dqk, heads * dqk, heads * dv], dim=-1)
    q, k, v = (_by_head(part, heads) for part in parts)
    scores = q @ k.transpose(-1, -2) / dqk**0.5
    allowed = _causal(torch.ones_like(scores[0, 0, 0])) > 0
    return linear(_join(torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1) @ v), block.output)


def _rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


def _causal(weights: Tensor) -> Tensor:
    """(…, L, L), zero where the key comes after the query."""
    return torch.tril(weights)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(M, B, L, H·w) → (M, B, H, L, w)"""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


def _join(x: Tensor) -> Tensor:
    """(M, B, H, L, w) → (M, B, L, H·w)"""
    return x.transpose(2, 3).flatten(3)


def _gated_ffn(z: Tensor, experts: GatedExperts) -> Tensor:
    return (F.silu(z @ experts.w1[0]) * (z @ experts.w3[0])) @ experts.w2[0]


def _mixture(z: Tensor, layer: MixtureOfExperts) -> Tensor:
    """(M, T, d) → (M, T, d). Each expert's rows fill whole tiles, so that shapes do not depend on the router's choices."""
    num_views, _, dim = z.shape
    num_experts, tile = layer.num_experts, ROWS_OF_A_TILE
    seen = z.flatten(0, 1).unflatten(0, (layer.views_seen, -1)).transpose(0, 1).flatten(1)
    logits = layer.router(seen).unflatten(1, (layer.views_seen, -1)).transpose(0, 1).flatten(0, 1)
    weights, experts = torch.softmax(logits, dim=-1).topk(layer.top_k, dim=-1)
    if layer.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    rows = z.flatten(0, 1)
    chosen = experts.flatten()
    one_hot = F.one_hot(chosen, num_experts)
    tiles = (one_hot.sum(0) + tile - 1) // tile  # of each expert
    last_tile = tiles.cumsum(0)
    rank = one_hot.cumsum(0).gather(1, chosen[:, None]).squeeze(1) - 1  # among the choices of its expert
    slot = (last_tile - tiles)[chosen] * tile + rank
    num_tiles = (chosen.shape[0] + tile - 1) // tile + num_experts
    copies = rows.repeat_interleave(layer.top_k, dim=0)
    padded = rows.new_zeros(num_tiles * tile, dim).index_copy(0, slot, copies).view(num_tiles, tile, dim)
    owner = torch.bucketize(torch.arange(num_tiles, device=z.device), last_tile, right=True).clamp(max=num_experts - 1)
    w1, w3, w2 = (weight[owner] for weight in (layer.experts.w1, layer.experts.w3, layer.experts.w2))
    results = torch.bmm(F.silu(torch.bmm(padded, w1)) * torch.bmm(padded, w3), w2).flatten(0, 1)
    by_row = results[slot].unflatten(0, (-1, layer.top_k))
    return (weights[:, :, None] * by_row).sum(1).unflatten(0, (num_views, -1))
