"""Relative attention in PyTorch, fast on one CPU core; the Triton kernels are tested against it.

Sequences of about the same length are processed together (`plan.py`), one chunk of their queries at a time. Only the weights
of the current chunk exist, so no memory is quadratic in the length. All sequences share the P tile, and all G groups share P
and T, so their products with v are computed over (keys, G·dv). Backward recomputes the weights. With 1/N folded into the
gradient g_A of the semantic channel:

    dv = Pᵀ g_P + Tᵀ g_T + Aᵀ g_A;  dP = Σ_G g_P vᵀ;  dT = Σ_G g_T vᵀ
    dS = (g_A vᵀ) ⊙ SiLU'(S);  dq = dS k;  dk = dSᵀ q
    d w_pos[r] = Σ of dP along the diagonal j − i = r;  d w_ts[b] = Σ of dT where bucket = b

On a CPU the order of every sum is fixed, so results repeat bit for bit.

Legend: T tokens, G groups (views × heads), n sequences of a bundle, P its padded length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.relative_attention.plan import CHUNK_ROWS, Bundle, Chunk, TilePlan, chunk_buckets
from kernels.relative_attention.reference import NUM_TIME_BUCKETS


def forward(
    q: Tensor, k: Tensor, v: Tensor, ts_weights: Tensor, pos_weights: Tensor, max_seq_len: int, plan: TilePlan
) -> Tensor:
    """The result (G, T, 3·dv); all tensors have the same floating dtype."""
    groups, num_tokens, dv = v.shape
    tiles = _Tiles(plan, ts_weights, pos_weights, max_seq_len, groups)
    q, k, v = tiles.pad(q), tiles.pad(k), tiles.pad(v)
    out = v.new_empty(v.shape[0], 3 * dv)
    for bundle in plan.bundles:
        bundle_q, bundle_k, bundle_v, bundle_out = (tiles.by_sequence(x, bundle) for x in (q, k, v, out))
        v_shared, v_scaled = tiles.by_channel(bundle_v), bundle_v / max_seq_len
        shared_out = bundle_out.view(groups, bundle.members, bundle.length, 3, dv)
        for chunk in bundle.chunks():
            rows, keys = slice(chunk.row, chunk.end), slice(0, chunk.end)
            for channel, weights in enumerate((tiles.positional(chunk), tiles.temporal(chunk, tiles.buckets(chunk)))):
                product = torch.bmm(weights, v_shared[:, keys]).unflatten(2, (groups, dv))
                shared_out[:, :, rows, channel] = product.permute(2, 0, 1, 3)
            scores, weights = tiles.blank(0, chunk, groups), tiles.blank(1, chunk, groups)
            torch.bmm(bundle_q[:, rows], bundle_k[:, keys].transpose(1, 2), out=scores)
            torch.ops.aten.silu.out(scores, out=weights)
            weights[:, :, chunk.row :].tril_()
            bundle_out[:, rows, 2 * dv :] = torch.bmm(weights, v_scaled[:, keys])
    return tiles.unpad(out, num_tokens)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    max_seq_len: int,
    plan: TilePlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, ts_weights and pos_weights for ``grad`` (G, T, 3·dv)."""
    groups, num_tokens, dv = v.shape
    tiles = _Tiles(plan, ts_weights, pos_weights, max_seq_len, groups)
    q, k, v, grad = tiles.pad(q), tiles.pad(k), tiles.pad(v), tiles.pad(grad)
    dq, dk, d_values = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_positions = torch.zeros_like(tiles.positions)
    d_buckets = torch.zeros(NUM_TIME_BUCKETS + 1, dtype=torch.float64, device=q.device)
    for bundle in plan.bundles:
        bundle_q, bundle_k, bundle_v, bundle_grad = (tiles.by_sequence(x, bundle) for x in (q, k, v, grad))
        bundle_dq, bundle_dk, bundle_dv = (tiles.by_sequence(x, bundle) for x in (dq, dk, d_values))
        v_shared = tiles.by_channel(bundle_v)
        grad_p, grad_t = tiles.by_channel(bundle_grad[:, :, :dv]), tiles.by_channel(bundle_grad[:, :, dv : 2 * dv])
        grad_a = bundle_grad[:, :, 2 * dv :] / max_seq_len
        dv_shared = torch.zeros_like(v_shared)
        for chunk in bundle.chunks():
            rows, keys = slice(chunk.row, chunk.end), slice(0, chunk.end)
            # The channels whose weights all groups share.
            buckets, keys_of_v = tiles.buckets(chunk), v_shared[:, keys].transpose(1, 2)
            contribution = torch.bmm(tiles.positional(chunk).transpose(1, 2), grad_p[:, rows])
            contribution.baddbmm_(tiles.temporal(chunk, buckets).transpose(1, 2), grad_t[:, rows])
            dv_shared[:, keys] += contribution
            d_weights = tiles.blank(0, chunk, 1)
            torch.bmm(grad_p[:, rows], keys_of_v, out=d_weights)
            d_positions[: chunk.rows, tiles.columns(chunk)] += d_weights.sum(0)
            torch.bmm(grad_t[:, rows], keys_of_v, out=d_weights)
            d_buckets += torch.bincount(buckets, d_weights.view(-1), NUM_TIME_BUCKETS + 1)
            # The semantic channel.
            scores, weights, d_scores = (tiles.blank(slot, chunk, groups) for slot in range(3))
            torch.bmm(bundle_q[:, rows], bundle_k[:, keys].transpose(1, 2), out=scores)
            torch.ops.aten.silu.out(scores, out=weights)
            weights[:, :, chunk.row :].tril_()
            bundle_dv[:, keys] += torch.bmm(weights.transpose(1, 2), grad_a[:, rows])
            torch.bmm(grad_a[:, rows], bundle_v[:, keys].transpose(1, 2), out=weights)
            torch.ops.aten.silu_backward.grad_input(weights, scores, grad_input=d_scores)
            d_scores[:, :, chunk.row :].tril_()
            bundle_dq[:, rows] = torch.bmm(d_scores, bundle_k[:, keys])
            bundle_dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), bundle_q[:, rows])
        by_group = bundle_dv.view(groups, bundle.members, bundle.length, dv)
        by_group += dv_shared.unflatten(2, (groups, dv)).permute(2, 0, 1, 3)
    d_ts_weights = d_buckets[:NUM_TIME_BUCKETS].to(ts_weights.dtype)
    d_pos_weights = sum_diagonals(d_positions, max_seq_len, pos_weights.numel())
    dq, dk, d_values = (tiles.unpad(x, num_tokens) for x in (dq, dk, d_values))
    return dq, dk, d_values, d_ts_weights, d_pos_weights


class _Tiles:
    """Operands in padded rows, the P and T tiles, and the scratch memory that the chunks of one call share."""

    def __init__(self, plan: TilePlan, ts_weights: Tensor, pos_weights: Tensor, max_seq_len: int, groups: int) -> None:
        self.plan, self.max_seq_len, self.groups = plan, max_seq_len, groups
        self.gather, self.scatter = plan.rows(groups)
        # Key columns of the widest tile, that of the last chunk of the longest sequence, rounded up to whole chunks.
        self.width = CHUNK_ROWS * max(1, -(-plan.max_length // CHUNK_ROWS))
        self.ts_weights = torch.cat([ts_weights, ts_weights.new_zeros(1)])  # MASKED_BUCKET weighs 0
        self.positions = self._widest_position_tile(pos_weights)
        largest = max((chunk.size for bundle in plan.bundles for chunk in bundle.chunks()), default=0)
        self.time_scratch = pos_weights.new_empty(largest)
        self.scratch = pos_weights.new_empty(3, groups * largest)
        self.bucket_scratch = torch.empty(largest, dtype=torch.int32, device=pos_weights.device)

    def _widest_position_tile(self, pos_weights: Tensor) -> Tensor:
        """P of the widest tile, (CHUNK_ROWS, width). The P of every other tile is a range of its columns."""
        row = torch.arange(CHUNK_ROWS, device=pos_weights.device)
        column = torch.arange(self.width, device=pos_weights.device) - (self.width - CHUNK_ROWS)
        offset = column[None, :] - row[:, None]
        outside = (offset > 0) | (offset <= -self.max_seq_len)
        index = (offset + self.max_seq_len - 1).clamp_(0, pos_weights.numel() - 1)
        return pos_weights[index].masked_fill_(outside, 0)

    def pad(self, x: Tensor) -> Tensor:
        """(G, T, w) → (G·S, w), with zeros in slots without a token."""
        tokens = torch.cat([x.reshape(-1, x.shape[2]), x.new_zeros(1, x.shape[2])])
        return tokens.index_select(0, self.gather)

    def unpad(self, x: Tensor, num_tokens: int) -> Tensor:
        """(G·S, w) → (G, T, w)."""
        return x.index_select(0, self.scatter).view(self.groups, num_tokens, x.shape[1])

    def by_sequence(self, x: Tensor, bundle: Bundle) -> Tensor:
        """The rows of a bundle in (G·S, w), as (G·n, P, w)."""
        start, size = self.groups * bundle.slot, self.groups * bundle.members * bundle.length
        return x[start : start + size].view(self.groups * bundle.members, bundle.length, x.shape[1])

    def by_channel(self, x: Tensor) -> Tensor:
        """(G·n, P, w) → (n, P, G·w), contiguous."""
        return x.unflatten(0, (self.groups, -1)).permute(1, 2, 0, 3).flatten(2).contiguous()

    def columns(self, chunk: Chunk) -> slice:
        """The columns of the widest tile that belong to the keys of ``chunk``."""
        first = self.width - CHUNK_ROWS - chunk.row
        return slice(first, first + chunk.end)

    def positional(self, chunk: Chunk) -> Tensor:
        """The P tile of ``chunk``, expanded to (n, rows, keys)."""
        return self.positions[: chunk.rows, self.columns(chunk)].expand(chunk.bundle.members, -1, -1)

    def buckets(self, chunk: Chunk) -> Tensor:
        """The time buckets of ``chunk``, (n · rows · keys,) int32."""
        if chunk.pairs >= 0:
            return self.plan.buckets[chunk.pairs : chunk.pairs + chunk.size]
        buckets = self.bucket_scratch[: chunk.size]
        chunk_buckets(chunk, self.plan.slot_times, out=buckets)
        return buckets

    def temporal(self, chunk: Chunk, buckets: Tensor) -> Tensor:
        """The T tiles of ``chunk``, (n, rows, keys)."""
        weights = self.time_scratch[: chunk.size]
        torch.index_select(self.ts_weights, 0, buckets, out=weights)
        return weights.view(chunk.bundle.members, chunk.rows, chunk.end)

    def blank(self, slot: int, chunk: Chunk, groups: int) -> Tensor:
        """(groups · n, rows, keys) of uninitialised scratch."""
        return self.scratch[slot][: groups * chunk.size].view(-1, chunk.rows, chunk.end)


def sum_diagonals(d_positions: Tensor, max_seq_len: int, size: int) -> Tensor:
    """The gradient of w_pos: the sums of the widest P tile's gradient along its diagonals."""
    rows, width = d_positions.shape
    # Viewed with one column more, each row starts one column further left than the one before, so diagonals become columns.
    padded = F.pad(F.pad(d_positions, (rows, 0)).view(-1), (0, rows))
    totals = padded.view(rows, width + rows + 1).sum(0, dtype=torch.float64)  # column width is the offset j − i = 0
    used = min(width, max_seq_len)
    gradient = d_positions.new_zeros(size)
    gradient[max_seq_len - used : max_seq_len] = totals[width - used + 1 : width + 1].to(gradient.dtype)
    return gradient
