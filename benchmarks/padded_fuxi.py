"""FuXi-α in straightforward eager PyTorch, with which `benchmarks.train_throughput` compares.

Attention works on padded (B, N, N) matrices, N = max_seq_len, as in the public implementation, and the negatives of each token
are gathered. What is computed per token stays jagged. It runs in one process, with torch's tables and AdamW. `tests/benchmarks`
compares it with the real block and the real loss.

Legend: B sequences, N max_seq_len, T tokens, D width, H heads, n negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.relative_attention.reference import time_bucket
from kernels.sampled_softmax.torch_form import MASKED_LOGIT
from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.model.biased_block import BiasedBlock
from mme.model.inputs import positions_in_sequence


class PaddedBlock(BiasedBlock):
    """One FuXi block with the weights of `mme.model.fuxi_block.FuxiBlock` with a dense FFN."""

    def __init__(self, dim: int, max_seq_len: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        head_dim = dim // num_heads
        super().__init__(dim, max_seq_len, num_heads, head_dim, head_dim, channels=3, dropout=dropout)
        self.w1, self.w3 = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, times: Tensor, inside: Tensor) -> Tensor:
        """x (T, D), times (B, N + 1) padded with the last one, inside (B, N) bool, true for tokens → (T, D)."""
        dim, heads, n = x.shape[1], self.num_heads, self.max_seq_len
        projected = F.silu(_norm(x) @ self.uvqk)
        u, v, q, k = projected.split([3 * dim, dim, dim, dim], dim=1)
        v, q, k = (_padded(part, inside).unflatten(2, (heads, -1)) for part in (v, q, k))
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        position = torch.arange(n, device=x.device)
        semantic = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k)) / n * causal
        temporal = self.ts_weights[time_bucket(times[:, 1:, None] - times[:, None, :-1])] * causal
        positional = self.pos_weights[position[None, :] - position[:, None] + n - 1] * causal
        channels = [
            torch.einsum("nm,bmhd->bnhd", positional, v),
            torch.einsum("bnm,bmhd->bnhd", temporal, v),
            torch.einsum("bhnm,bmhd->bnhd", semantic, v),
        ]
        attended = torch.cat(channels, dim=3).flatten(2)[inside]
        o = self.output(F.dropout(u * _norm(attended), self.dropout, self.training)) + x
        z = F.dropout(_norm(o), self.dropout, self.training)
        return self.w2(F.silu(self.w1(z)) * self.w3(z)) + o


class PaddedFuxi(nn.Module):
    """FuXi-α with one table of the configuration's total width, dense FFN and per-token negatives."""

    def __init__(self, config: Config, num_items: int) -> None:
        super().__init__()
        model, self.loss = config.model, config.loss
        self.num_items, self.dropout, self.max_seq_len = num_items, model.dropout, config.data.max_seq_len
        dim = model.embedding_dim
        self.items = nn.Embedding(num_items, dim)
        self.positions = nn.Embedding(self.max_seq_len, dim)
        hidden_dim = max(1, round(model.ffn_multiplier * dim))
        self.blocks = nn.ModuleList(
            PaddedBlock(dim, self.max_seq_len, model.num_heads, hidden_dim, model.dropout)
            for _ in range(model.num_blocks)
        )

    def forward(self, batch: SequenceBatch) -> Tensor:
        """The mean loss over the tokens, a scalar."""
        inside, times = self.padded(batch)
        place = positions_in_sequence(batch.seq_offsets, batch.num_tokens)
        x = self.items(batch.item_ids) * self.items.embedding_dim**0.5 + self.positions(place)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, times, inside)
        negatives = torch.randint(self.num_items, (batch.num_tokens, self.loss.num_negatives), device=x.device)
        return gathered_loss(x, self.items.weight, batch.target_ids, negatives, self.loss.temperature).mean()

    def padded(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(B, N) bool, true for tokens; and (B, N + 1), the times of each sequence, padded with its last one."""
        lengths = batch.seq_offsets.diff()[:, None]
        place = torch.arange(self.max_seq_len + 1, device=lengths.device)
        sequence = torch.arange(batch.num_sequences, device=lengths.device)[:, None]
        first = batch.seq_offsets[:-1, None] + sequence
        return place[:-1] < lengths, batch.timestamps[first + place.minimum(lengths)]


def gathered_loss(hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(T,) −log softmax of the target among itself and its negatives (T, n), by cosine; ``items`` (U, D)."""
    rows = torch.cat([targets[:, None], negatives], dim=1)
    vectors = F.normalize(F.embedding(rows, items), dim=-1, eps=1e-6)
    queries = F.normalize(hidden, dim=-1, eps=1e-6)
    logits = torch.einsum("td,tnd->tn", queries, vectors) / temperature
    logits = logits.masked_fill(F.pad(negatives == targets[:, None], (1, 0)), MASKED_LOGIT)
    return -torch.log_softmax(logits, dim=1)[:, 0]


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def _padded(x: Tensor, inside: Tensor) -> Tensor:
    """(T, w) → (B, N, w), with zeros in places without a token."""
    return x.new_zeros(*inside.shape, x.shape[1]).masked_scatter(inside[:, :, None], x)
