"""Relative attention in PyTorch, tile by tile: the twin of the Triton kernels, fast on one CPU core.

No padded token is computed and nothing of size N×N is held: one tile of (TILE_ROWS, keys) weights a channel at a time.
The P and T tiles are the same for all G groups, so their products with v are one matrix product each,
(rows, keys) @ (keys, G·dv). Backward recomputes the weights. With 1/N folded into the semantic channel's gradient g_A:

    dv = Pᵀ g_P + Tᵀ g_T + Aᵀ g_A;  dP = Σ_G g_P vᵀ;  dT = Σ_G g_T vᵀ
    dS = (g_A vᵀ) ⊙ SiLU'(S);  dq = dS k;  dk = dSᵀ q
    d w_pos[r] = Σ of dP along the diagonal j − i = r;  d w_ts[b] = Σ of dT where bucket = b

The order of every sum is fixed, so results are the same bit for bit from run to run.

Legend: T tokens, G groups (views × heads).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.relative_attention.plan import TILE_ROWS, Tile, TilePlan, tile_buckets, tile_mask
from kernels.relative_attention.reference import NUM_TIME_BUCKETS


def forward(
    q: Tensor, k: Tensor, v: Tensor, ts_weights: Tensor, pos_weights: Tensor, max_seq_len: int, plan: TilePlan
) -> Tensor:
    """(G, T, 3·dv); all tensors of one floating dtype."""
    groups, num_tokens, dv = v.shape
    tiles = _Tiles(plan, ts_weights, pos_weights, max_seq_len, groups)
    v_flat, v_scaled = _flat(v), v / max_seq_len
    out = v.new_empty(groups, num_tokens, 3 * dv)
    for tile in tiles.tiles:
        rows, keys = slice(tile.row, tile.row_end), slice(tile.key, tile.row_end)
        mask = tiles.mask(tile)
        shared = torch.mm(tiles.positional(tile, mask), v_flat[keys])
        out[:, rows, :dv] = shared.view(tile.rows, groups, dv).transpose(0, 1)
        torch.mm(tiles.temporal(tile, tiles.buckets(tile)), v_flat[keys], out=shared)
        out[:, rows, dv : 2 * dv] = shared.view(tile.rows, groups, dv).transpose(0, 1)
        scores, weights = tiles.blank(0, groups, tile), tiles.blank(1, groups, tile)
        torch.bmm(q[:, rows], k[:, keys].transpose(1, 2), out=scores)
        torch.ops.aten.silu.out(scores, out=weights)
        _keep_causal(weights, tile, mask)
        out[:, rows, 2 * dv :] = torch.bmm(weights, v_scaled[:, keys])
    return out


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
    """Gradients of q, k, v, ts_weights and pos_weights for ``grad`` (G, T, 3·dv)."""
    groups, num_tokens, dv = v.shape
    tiles = _Tiles(plan, ts_weights, pos_weights, max_seq_len, groups)
    v_flat = _flat(v)
    grad_p, grad_t = _flat(grad[:, :, :dv]), _flat(grad[:, :, dv : 2 * dv])
    grad_a = grad[:, :, 2 * dv :] / max_seq_len
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    dv_flat, dv_semantic = torch.zeros_like(v_flat), torch.zeros_like(v)
    d_positions = torch.zeros_like(tiles.positions)
    d_buckets = torch.zeros(NUM_TIME_BUCKETS + 1, dtype=torch.float64, device=q.device)
    for tile in tiles.tiles:
        rows, keys = slice(tile.row, tile.row_end), slice(tile.key, tile.row_end)
        mask = tiles.mask(tile)
        buckets = tiles.buckets(tile)
        dv_flat[keys].addmm_(tiles.positional(tile, mask).t(), grad_p[rows])
        dv_flat[keys].addmm_(tiles.temporal(tile, buckets).t(), grad_t[rows])
        d_position = d_positions[: tile.rows, tiles.columns(tile)]
        if mask is None:
            d_position.addmm_(grad_p[rows], v_flat[keys].t())
        else:
            d_position.addcmul_(grad_p[rows] @ v_flat[keys].t(), mask)
        d_temporal = tiles.blank(0, 1, tile)[0]
        torch.mm(grad_t[rows], v_flat[keys].t(), out=d_temporal)
        d_buckets += torch.bincount(buckets, d_temporal.view(-1), NUM_TIME_BUCKETS + 1)

        scores, weights, d_scores = (tiles.blank(slot, groups, tile) for slot in range(3))
        torch.bmm(q[:, rows], k[:, keys].transpose(1, 2), out=scores)
        torch.ops.aten.silu.out(scores, out=weights)
        _keep_causal(weights, tile, mask)
        dv_semantic[:, keys].baddbmm_(weights.transpose(1, 2), grad_a[:, rows])
        torch.bmm(grad_a[:, rows], v[:, keys].transpose(1, 2), out=weights)
        torch.ops.aten.silu_backward.grad_input(weights, scores, grad_input=d_scores)
        _keep_causal(d_scores, tile, mask)
        dq[:, rows] = torch.bmm(d_scores, k[:, keys])
        dk[:, keys].baddbmm_(d_scores.transpose(1, 2), q[:, rows])
    d_values = dv_semantic.add_(dv_flat.view(num_tokens, groups, dv).transpose(0, 1))
    d_ts_weights = d_buckets[:NUM_TIME_BUCKETS].to(ts_weights.dtype)
    return dq, dk, d_values, d_ts_weights, _sum_diagonals(d_positions, max_seq_len, pos_weights.numel())


class _Tiles:
    """The P and T tiles of one call, and the scratch that its tiles share."""

    def __init__(self, plan: TilePlan, ts_weights: Tensor, pos_weights: Tensor, max_seq_len: int, groups: int) -> None:
        self.plan, self.max_seq_len = plan, max_seq_len
        self.tiles = plan.tile_list()
        # Key columns of the widest tile: the last chunk of the longest sequence, made up to whole chunks.
        self.width = TILE_ROWS * max(1, -(-plan.max_length // TILE_ROWS))
        self.ts_weights = torch.cat([ts_weights, ts_weights.new_zeros(1)])  # MASKED_BUCKET weighs 0
        self.positions = self._position_tile(pos_weights)
        self.time_scratch = pos_weights.new_empty(TILE_ROWS * self.width)
        self.scratch = pos_weights.new_empty(3, groups * TILE_ROWS * self.width)
        bucket_scratch = 0 if plan.buckets.numel() else TILE_ROWS * self.width
        self.bucket_scratch = torch.empty(bucket_scratch, dtype=torch.int32, device=pos_weights.device)

    def _position_tile(self, pos_weights: Tensor) -> Tensor:
        """P of the widest tile, (TILE_ROWS, width): every other tile's P is the end of its columns."""
        row = torch.arange(TILE_ROWS, device=pos_weights.device)
        column = torch.arange(self.width, device=pos_weights.device) - (self.width - TILE_ROWS)
        offset = column[None, :] - row[:, None]
        outside = (offset > 0) | (offset <= -self.max_seq_len)
        index = (offset + self.max_seq_len - 1).clamp_(0, pos_weights.numel() - 1)
        return pos_weights[index].masked_fill_(outside, 0)

    def columns(self, tile: Tile) -> slice:
        """Where ``tile``'s keys stand among the columns of the widest tile."""
        first = self.width - TILE_ROWS + tile.rows - tile.keys
        return slice(first, first + tile.keys)

    def mask(self, tile: Tile) -> Tensor | None:
        return None if tile.mask_offset < 0 else tile_mask(tile, self.plan.masks).to(self.positions.dtype)

    def positional(self, tile: Tile, mask: Tensor | None) -> Tensor:
        p = self.positions[: tile.rows, self.columns(tile)]
        return p if mask is None else p * mask

    def buckets(self, tile: Tile) -> Tensor:
        """(rows · keys,) int32."""
        plan = self.plan
        if tile.bucket_offset >= 0:
            return plan.buckets[tile.bucket_offset :][: tile.rows * tile.keys]
        return tile_buckets(tile, plan.key_times, plan.next_times, plan.masks, out=self.bucket_scratch).view(-1)

    def temporal(self, tile: Tile, buckets: Tensor) -> Tensor:
        t = self.time_scratch[: buckets.numel()]
        torch.index_select(self.ts_weights, 0, buckets, out=t)
        return t.view(tile.rows, tile.keys)

    def blank(self, slot: int, groups: int, tile: Tile) -> Tensor:
        """(groups, rows, keys) of uninitialised scratch."""
        return self.scratch[slot][: groups * tile.rows * tile.keys].view(groups, tile.rows, tile.keys)


def _keep_causal(x: Tensor, tile: Tile, mask: Tensor | None) -> None:
    """Zeroes (G, rows, keys) weights where the key is later than the query or of another sequence."""
    if mask is not None:
        x.mul_(mask)
    else:
        x[:, :, tile.keys - tile.rows :].tril_()


def _flat(x: Tensor) -> Tensor:
    """(G, T, w) → (T, G·w), contiguous."""
    return x.transpose(0, 1).flatten(1).contiguous()


def _sum_diagonals(d_positions: Tensor, max_seq_len: int, size: int) -> Tensor:
    """The gradient of w_pos from that of the widest P tile: its sums along the diagonals."""
    rows, width = d_positions.shape
    # Read back with one column more, each row starts one further left than the row before: diagonals become columns.
    padded = F.pad(F.pad(d_positions, (rows, 0)).view(-1), (0, rows))
    totals = padded.view(rows, width + rows + 1).sum(0, dtype=torch.float64)  # column width is the offset j − i = 0
    used = min(width, max_seq_len)
    gradient = d_positions.new_zeros(size)
    gradient[max_seq_len - used : max_seq_len] = totals[width - used + 1 : width + 1].to(gradient.dtype)
    return gradient
