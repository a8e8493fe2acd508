"""Triton kernels of relative attention: forward, and four backward kernels without floating-point atomics.

forward   a program per (query block, GROUPS groups): one pass over the keys; mask, time buckets, P and T once for its
          groups. Products a pair and group: S, P v, T v, A v.
dq        a program per (query block, group): S, g_A vᵀ, dS k. Needs neither P nor T.
dk, dv    a program per (key block, GROUPS groups): S, g_A vᵀ, dSᵀ q, Aᵀ g_A, Pᵀ g_P, Tᵀ g_T.
d w_ts    a program per query block: Σ_G g_T vᵀ, then one sum a time bucket that stands in the tile, in rising order.
d w_pos   a program per (distance of query and key block, split): all tiles at one distance share their diagonals, so
          their Σ_G g_P vᵀ add up in one accumulator; the diagonals are summed once, on the host's side.

Every partial sum has its own place in memory and the host adds them in a fixed order: gradients are the same bit for
bit from run to run. dP and dT serve nothing else, so their kernels repeat no product; S and g_A vᵀ are computed twice.

Layout: q, k (G, T, dqk), v (G, T, dv), out and grad (G, T, 3·dv), contiguous; addresses in int64. Work items are
(sequence, block) pairs, heaviest first; −1 marks the padding of their list.

Legend: L length of a sequence, N max_seq_len; i_ indices, m_ masks, p_ pointers, b_ blocks of values.
"""

# Triton's language has no star in a tuple, and mypy no tuples of accumulators that grow in unrolled loops.
# ruff: noqa: RUF005
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(p, i_group, num_groups, num_tokens, start, position, length, stride, column, WIDTH: tl.constexpr):
    """(rows, BLOCK_WIDTH) of one group: columns [column, column + WIDTH) of a sequence's rows, zeros beyond its end."""
    i_column = tl.arange(0, triton.next_power_of_2(max(WIDTH, 16)))
    m_load = (position[:, None] < length) & (i_column[None, :] < WIDTH) & (i_group < num_groups)
    row = tl.cast(i_group, tl.int64) * num_tokens + start + position
    return tl.load(p + row[:, None] * stride + column + i_column[None, :], mask=m_load, other=0.0)


@triton.jit
def _store_rows(
    p, value, i_group, num_groups, num_tokens, start, position, length, stride, column, WIDTH: tl.constexpr
):
    i_column = tl.arange(0, triton.next_power_of_2(max(WIDTH, 16)))
    m_store = (position[:, None] < length) & (i_column[None, :] < WIDTH) & (i_group < num_groups)
    row = tl.cast(i_group, tl.int64) * num_tokens + start + position
    p_store = p + row[:, None] * stride + column + i_column[None, :]
    tl.store(p_store, value.to(p.dtype.element_ty), mask=m_store)


@triton.jit
def _time_bucket(seconds, p_thresholds):
    """Buckets of a tile of int64 differences; exact: the thresholds decide, not the logarithm."""
    x = tl.maximum(tl.abs(seconds).to(tl.float32), 1.0)
    # A thousandth low, so that the estimate is the bucket or the one before it.
    estimate = tl.minimum(tl.log(x) * (1.0 / 0.301) - 1e-3, 127.0).to(tl.int32)
    threshold = tl.load(p_thresholds + estimate + 1)
    return estimate + (x >= threshold).to(tl.int32)


@triton.jit
def _bias_tiles(distance, seconds, m_tile, p_ts_weights, p_pos_weights, p_thresholds):
    """P and T of a tile, float32, zero where masked; distance is j − i + N − 1."""
    b_p = tl.load(p_pos_weights + distance, mask=m_tile, other=0.0).to(tl.float32)
    bucket = _time_bucket(seconds, p_thresholds)
    b_t = tl.load(p_ts_weights + bucket, mask=m_tile, other=0.0).to(tl.float32)
    return b_p, b_t


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _silu_slope(x):
    s = _sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _item(p_items, i_item, p_offsets):
    """Sequence, block, first token and length of a work item; sequence −1: no work."""
    i_sequence = tl.load(p_items + 2 * i_item)
    i_block = tl.load(p_items + 2 * i_item + 1).to(tl.int32)
    safe = tl.maximum(i_sequence, 0)
    start = tl.load(p_offsets + safe)
    length = (tl.load(p_offsets + safe + 1) - start).to(tl.int32)
    return i_sequence, i_block, start, length


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_offsets, p_times, p_ts_weights, p_pos_weights, p_thresholds, p_items,
    num_tokens, max_seq_len, num_groups, group_blocks,
    DQK: tl.constexpr, DV: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, start, length = _item(p_items, tl.program_id(0) // group_blocks, p_offsets)
    if i_sequence < 0:
        return
    i_first = (tl.program_id(0) % group_blocks) * GROUPS
    i_query = i_block * BLOCK + tl.arange(0, BLOCK)
    p_times += start + i_sequence
    next_times = tl.load(p_times + i_query + 1, mask=i_query < length, other=0)
    out_p, out_t, out_a, b_q = (), (), (), ()
    for g in tl.static_range(GROUPS):
        out_p = out_p + (tl.zeros([BLOCK, triton.next_power_of_2(max(DV, 16))], tl.float32),)
        out_t = out_t + (tl.zeros([BLOCK, triton.next_power_of_2(max(DV, 16))], tl.float32),)
        out_a = out_a + (tl.zeros([BLOCK, triton.next_power_of_2(max(DV, 16))], tl.float32),)
        b_q = b_q + (_load_rows(p_q, i_first + g, num_groups, num_tokens, start, i_query, length, DQK, 0, DQK),)
    for i_start in range(0, (i_block + 1) * BLOCK, STEP):
        i_key = i_start + tl.arange(0, STEP)
        m_tile = (i_key[None, :] <= i_query[:, None]) & (i_query[:, None] < length)
        key_times = tl.load(p_times + i_key, mask=i_key < length, other=0)
        distance = i_key[None, :] - i_query[:, None] + (max_seq_len - 1)
        seconds = next_times[:, None] - key_times[None, :]
        b_p, b_t = _bias_tiles(distance, seconds, m_tile, p_ts_weights, p_pos_weights, p_thresholds)
        next_p, next_t, next_a = (), (), ()
        for g in tl.static_range(GROUPS):
            b_k = _load_rows(p_k, i_first + g, num_groups, num_tokens, start, i_key, length, DQK, 0, DQK)
            b_v = _load_rows(p_v, i_first + g, num_groups, num_tokens, start, i_key, length, DV, 0, DV)
            b_s = tl.dot(b_q[g], tl.trans(b_k), input_precision=PRECISION)
            b_a = tl.where(m_tile, b_s * _sigmoid(b_s), 0.0)
            next_p = next_p + (tl.dot(b_p.to(b_v.dtype), b_v, out_p[g], input_precision=PRECISION),)
            next_t = next_t + (tl.dot(b_t.to(b_v.dtype), b_v, out_t[g], input_precision=PRECISION),)
            next_a = next_a + (tl.dot(b_a.to(b_v.dtype), b_v, out_a[g], input_precision=PRECISION),)
        out_p, out_t, out_a = next_p, next_t, next_a
    for g in tl.static_range(GROUPS):
        i_group = i_first + g
        a = out_a[g] / max_seq_len
        _store_rows(p_out, out_p[g], i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, 0, DV)
        _store_rows(p_out, out_t[g], i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, DV, DV)
        _store_rows(p_out, a, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, 2 * DV, DV)


@triton.jit
def backward_query_kernel(
    p_q, p_k, p_v, p_grad, p_dq, p_offsets, p_items, num_tokens, max_seq_len, num_groups,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, start, length = _item(p_items, tl.program_id(0) // num_groups, p_offsets)
    if i_sequence < 0:
        return
    i_group = tl.program_id(0) % num_groups
    i_query = i_block * BLOCK + tl.arange(0, BLOCK)
    b_q = _load_rows(p_q, i_group, num_groups, num_tokens, start, i_query, length, DQK, 0, DQK)
    b_g = _load_rows(p_grad, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, 2 * DV, DV)
    b_dq = tl.zeros([BLOCK, triton.next_power_of_2(max(DQK, 16))], tl.float32)
    for i_start in range(0, (i_block + 1) * BLOCK, STEP):
        i_key = i_start + tl.arange(0, STEP)
        b_k = _load_rows(p_k, i_group, num_groups, num_tokens, start, i_key, length, DQK, 0, DQK)
        b_v = _load_rows(p_v, i_group, num_groups, num_tokens, start, i_key, length, DV, 0, DV)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_da = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        b_ds = tl.where(i_key[None, :] <= i_query[:, None], b_da * _silu_slope(b_s), 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    _store_rows(p_dq, b_dq / max_seq_len, i_group, num_groups, num_tokens, start, i_query, length, DQK, 0, DQK)


@triton.jit
def backward_key_kernel(
    p_q, p_k, p_v, p_grad, p_dk, p_dv, p_offsets, p_times, p_ts_weights, p_pos_weights, p_thresholds, p_items,
    num_tokens, max_seq_len, num_groups, group_blocks,
    DQK: tl.constexpr, DV: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, start, length = _item(p_items, tl.program_id(0) // group_blocks, p_offsets)
    if i_sequence < 0:
        return
    i_first = (tl.program_id(0) % group_blocks) * GROUPS
    i_key = i_block * BLOCK + tl.arange(0, BLOCK)
    p_times += start + i_sequence
    key_times = tl.load(p_times + i_key, mask=i_key < length, other=0)
    b_k, b_v, b_dk, b_dv = (), (), (), ()
    for g in tl.static_range(GROUPS):
        b_k = b_k + (_load_rows(p_k, i_first + g, num_groups, num_tokens, start, i_key, length, DQK, 0, DQK),)
        b_v = b_v + (_load_rows(p_v, i_first + g, num_groups, num_tokens, start, i_key, length, DV, 0, DV),)
        b_dk = b_dk + (tl.zeros([BLOCK, triton.next_power_of_2(max(DQK, 16))], tl.float32),)
        b_dv = b_dv + (tl.zeros([BLOCK, triton.next_power_of_2(max(DV, 16))], tl.float32),)
    scale = 1.0 / max_seq_len  # a division a pair would be a reciprocal more of each
    # Tiles stand transposed, (keys, queries), so that they are left operands as they come.
    for i_start in range(i_block * BLOCK, length, STEP):
        i_query = i_start + tl.arange(0, STEP)
        m_tile = (i_key[:, None] <= i_query[None, :]) & (i_query[None, :] < length)
        next_times = tl.load(p_times + i_query + 1, mask=i_query < length, other=0)
        distance = i_key[:, None] - i_query[None, :] + (max_seq_len - 1)
        seconds = next_times[None, :] - key_times[:, None]
        b_p, b_t = _bias_tiles(distance, seconds, m_tile, p_ts_weights, p_pos_weights, p_thresholds)
        next_dk, next_dv = (), ()
        for g in tl.static_range(GROUPS):
            i_group = i_first + g
            b_g = _load_rows(p_grad, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, 0, DV)
            acc = tl.dot(b_p.to(b_g.dtype), b_g, b_dv[g], input_precision=PRECISION)
            b_g = _load_rows(p_grad, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, DV, DV)
            acc = tl.dot(b_t.to(b_g.dtype), b_g, acc, input_precision=PRECISION)
            b_q = _load_rows(p_q, i_group, num_groups, num_tokens, start, i_query, length, DQK, 0, DQK)
            b_s = tl.dot(b_k[g], tl.trans(b_q), input_precision=PRECISION)
            b_sigmoid = _sigmoid(b_s)
            b_g = _load_rows(p_grad, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, 2 * DV, DV)
            b_silu = b_s * b_sigmoid
            b_a = tl.where(m_tile, b_silu * scale, 0.0)
            next_dv = next_dv + (tl.dot(b_a.to(b_g.dtype), b_g, acc, input_precision=PRECISION),)
            b_da = tl.dot(b_v[g], tl.trans(b_g), input_precision=PRECISION)
            b_ds = tl.where(m_tile, b_da * (b_sigmoid + b_silu * (1.0 - b_sigmoid)), 0.0)
            next_dk = next_dk + (tl.dot(b_ds.to(b_q.dtype), b_q, b_dk[g], input_precision=PRECISION),)
        b_dk, b_dv = next_dk, next_dv
    for g in tl.static_range(GROUPS):
        _store_rows(p_dk, b_dk[g] / max_seq_len, i_first + g, num_groups, num_tokens, start, i_key, length, DQK, 0, DQK)
        _store_rows(p_dv, b_dv[g], i_first + g, num_groups, num_tokens, start, i_key, length, DV, 0, DV)


@triton.jit
def backward_time_kernel(
    p_v, p_grad, p_partial, p_offsets, p_times, p_thresholds, p_items, num_tokens, num_groups,
    DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_item = tl.program_id(0)
    i_sequence, i_block, start, length = _item(p_items, i_item, p_offsets)
    i_bucket = tl.arange(0, 256)
    b_sum = tl.zeros([256], tl.float32)
    if i_sequence >= 0:
        i_query = i_block * BLOCK + tl.arange(0, BLOCK)
        p_times += start + i_sequence
        next_times = tl.load(p_times + i_query + 1, mask=i_query < length, other=0)
        for i_start in range(0, (i_block + 1) * BLOCK, STEP):
            i_key = i_start + tl.arange(0, STEP)
            m_tile = (i_key[None, :] <= i_query[:, None]) & (i_query[:, None] < length)
            b_dt = tl.zeros([BLOCK, STEP], tl.float32)
            for i_group in range(0, num_groups):
                b_g = _load_rows(p_grad, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, DV, DV)
                b_v = _load_rows(p_v, i_group, num_groups, num_tokens, start, i_key, length, DV, 0, DV)
                b_dt = tl.dot(b_g, tl.trans(b_v), b_dt, input_precision=PRECISION)
            key_times = tl.load(p_times + i_key, mask=i_key < length, other=0)
            bucket = _time_bucket(next_times[:, None] - key_times[None, :], p_thresholds)
            lowest = tl.min(tl.where(m_tile, bucket, 255))
            highest = tl.max(tl.where(m_tile, bucket, 0))
            for i_present in range(lowest, highest + 1):
                total = tl.sum(tl.where(m_tile & (bucket == i_present), b_dt, 0.0))
                b_sum += tl.where(i_bucket == i_present, total, 0.0)
    tl.store(p_partial + i_item.to(tl.int64) * 129 + i_bucket, b_sum, mask=i_bucket < 129)


@triton.jit
def backward_position_kernel(
    p_v, p_grad, p_partial, p_offsets, p_items, p_counts, num_tokens, num_groups, splits,
    DV: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_distance = tl.program_id(0) // splits
    # Items come with falling block numbers: those at least i_distance blocks from their start stand first.
    count = tl.load(p_counts + i_distance)
    i_row = tl.arange(0, BLOCK)
    b_dp = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i_item in range(tl.program_id(0) % splits, count, splits):
        _, i_block, start, length = _item(p_items, i_item, p_offsets)
        i_query = i_block * BLOCK + i_row
        i_key = (i_block - i_distance) * BLOCK + i_row
        for i_group in range(0, num_groups):
            b_g = _load_rows(p_grad, i_group, num_groups, num_tokens, start, i_query, length, 3 * DV, 0, DV)
            b_v = _load_rows(p_v, i_group, num_groups, num_tokens, start, i_key, length, DV, 0, DV)
            b_dp = tl.dot(b_g, tl.trans(b_v), b_dp, input_precision=PRECISION)
    p_store = p_partial + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + i_row[:, None] * BLOCK + i_row[None, :]
    tl.store(p_store, b_dp)
