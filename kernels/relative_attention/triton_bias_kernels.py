"""Triton kernels of the positional and temporal channel, whose weights all groups share, and of the weights' gradients.

tables       makes P as Toeplitz tiles, one per distance of query and key block, and the time weights by cell and by code.
forward      has one program per (query block, COLUMNS columns), which computes P v and T v. The columns are those of all
             groups, side by side.
dv           has one program per (key block, COLUMNS columns), which computes Pᵀ g_P + Tᵀ g_T in float32 from transposed tiles.
value sums   computes Σ v of each block of keys.
d w_ts       has one program per query block. It computes Σ_G g_T vᵀ for the tiles of several buckets and one sum per bucket.
             A tile of one bucket adds ⟨Σ g_T, Σ v⟩ without a matrix product.
d w_pos      has one program per (distance of query and key block, split). All tiles at one distance share their diagonals,
             so one accumulator adds up their Σ_G g_P vᵀ, and PyTorch sums the diagonals once at the end.

The plan gives each tile below the diagonal a code (`work_plan.py`). In a tile of one or two time buckets, one comparison
selects the weights; in a tile of several buckets, they are looked up pair by pair. Times are int32 seconds since the earliest
time of the sequence. A second launch, on int64 times, processes the sequences that span 2³¹ s or more and looks up every tile.

Every partial sum has its own place in memory and is added in a fixed order, so gradients repeat bit for bit. Layout and
legend are those of `triton_semantic_kernels` and `triton_tiles`.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.relative_attention import time_tables
from kernels.relative_attention.triton_tiles import (
    column_mask,
    column_pointers,
    load_columns,
    load_item,
    selected_weights,
    time_weights,
)

NUM_CELLS = tl.constexpr(time_tables.NUM_CELLS)
NUM_CODES = tl.constexpr(258)  # 129 for tiles of two buckets, 129 for tiles of one
SIZES = ["num_tokens", "max_seq_len", "num_groups", "column_blocks", "num_blocks", "splits"]


@triton.jit
def _bits(weights, dtype: tl.constexpr):
    """The bit patterns of weights as int32; a 16-bit dtype is in the lower half."""
    if dtype == tl.float32:
        return weights.to(tl.int32, bitcast=True)
    else:
        return weights.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize=["max_seq_len", "num_blocks"])
def tables_kernel(
    p_ts_weights, p_pos_weights, p_lookup, p_code_thresholds, p_cells, p_selects, p_positions, max_seq_len, num_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p_positions.dtype.element_ty
    i_distance = tl.program_id(0)
    if i_distance < num_blocks:
        i_row = tl.arange(0, BLOCK)
        offset = i_row[None, :] - i_row[:, None] - i_distance * BLOCK  # j − i
        m_tile = (offset <= 0) & (offset > -max_seq_len)
        b_p = tl.load(p_pos_weights + offset + max_seq_len - 1, mask=m_tile, other=0.0)
        p_tile = p_positions + i_distance.to(tl.int64) * (BLOCK * BLOCK)
        tl.store(p_tile + i_row[:, None] * BLOCK + i_row[None, :], b_p.to(dtype))
    else:
        i_cell = tl.arange(0, NUM_CELLS)
        b_cell = tl.load(p_lookup + i_cell)
        if dtype != tl.float32:
            bucket = (b_cell >> 32).to(tl.int32)
            low = _bits(tl.load(p_ts_weights + bucket), dtype)
            high = _bits(tl.load(p_ts_weights + tl.minimum(bucket + 1, 128)), dtype)
            b_cell = (b_cell & 0xFFFFFFFF) | (((high << 16) | low).to(tl.int64) << 32)
        tl.store(p_cells + i_cell, b_cell)
        i_code = tl.arange(0, 512)
        m_code = i_code < NUM_CODES
        low = tl.maximum(tl.where(i_code < 129, i_code - 1, i_code - 129), 0)
        high = tl.where(i_code < 129, i_code, i_code - 129)
        threshold = tl.load(p_code_thresholds + i_code, mask=m_code, other=0)
        tl.store(p_selects + 3 * i_code, threshold, mask=m_code)
        low = _bits(tl.load(p_ts_weights + low, mask=m_code, other=0.0), dtype)
        high = _bits(tl.load(p_ts_weights + high, mask=m_code, other=0.0), dtype)
        tl.store(p_selects + 3 * i_code + 1, low, mask=m_code)
        tl.store(p_selects + 3 * i_code + 2, high, mask=m_code)


@triton.jit(do_not_specialize=SIZES)
def bias_forward_kernel(
    p_v, p_out, p_offsets, p_times, p_ts_weights, p_cells, p_selects, p_codes, p_positions, p_items,
    num_tokens, num_groups, column_blocks, num_blocks,
    DV: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_item = tl.program_id(0) // column_blocks
    i_sequence, i_block, i_row, wide, start, length = load_item(p_items, i_item, p_offsets)
    if (i_sequence < 0) | (wide != (p_times.dtype.element_ty == tl.int64)):
        return
    dtype: tl.constexpr = p_v.dtype.element_ty
    all_columns: tl.constexpr = triton.next_power_of_2(max(DV, 16)) == DV and COLUMNS <= DV
    i_column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    i_query, i_step, i_tile = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP), tl.arange(0, BLOCK)
    m_query, m_v = (i_query < length)[:, None], column_mask(i_column, num_groups, DV)
    p_times += start + i_sequence
    next_times = tl.load(p_times + i_query + 1, mask=i_query < length, other=0)
    p_values = column_pointers(p_v, i_column, num_tokens, start + i_step, DV, DV)
    p_tile = p_positions + i_tile[:, None] * BLOCK + i_step[None, :]
    p_codes += i_row * num_blocks
    out_p = tl.zeros([BLOCK, COLUMNS], tl.float32)
    out_t = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for i_start in range(0, i_block * BLOCK, STEP):
        i_key_block = i_start // BLOCK
        b_v = load_columns(p_values + i_start * DV, m_v, all_columns)
        b_p = tl.load(p_tile + (i_block - i_key_block) * (BLOCK * BLOCK) + tl.multiple_of(i_start % BLOCK, STEP))
        key_times = tl.load(p_times + i_start + i_step)
        out_p = tl.dot(b_p, b_v, out_p, input_precision=PRECISION)
        code = tl.load(p_codes + i_key_block).to(tl.int32)
        if code >= 0:
            threshold, low, high = selected_weights(p_selects, code, dtype)
            b_t = tl.where((next_times - threshold)[:, None] >= key_times[None, :], high, low)
        else:
            b_t = time_weights(next_times[:, None] - key_times[None, :], p_cells, p_ts_weights, dtype)
        out_t = tl.dot(b_t, b_v, out_t, input_precision=PRECISION)
    for i_start in range(i_block * BLOCK, i_block * BLOCK + BLOCK, STEP):
        i_key = i_start + i_step
        b_v = tl.load(p_values + i_start * DV, mask=(i_key < length)[:, None] & m_v, other=0.0)
        b_p = tl.load(p_tile + tl.multiple_of(i_start % BLOCK, STEP))
        key_times = tl.load(p_times + i_key, mask=i_key < length, other=0)
        out_p = tl.dot(b_p, b_v, out_p, input_precision=PRECISION)
        b_t = time_weights(next_times[:, None] - key_times[None, :], p_cells, p_ts_weights, dtype)
        b_t = tl.where(i_key[None, :] <= i_query[:, None], b_t, tl.zeros_like(b_t))
        out_t = tl.dot(b_t, b_v, out_t, input_precision=PRECISION)
    p_store = column_pointers(p_out, i_column, num_tokens, start + i_query, 3 * DV, DV)
    tl.store(p_store, out_p.to(dtype), mask=m_query & m_v)
    tl.store(p_store + DV, out_t.to(dtype), mask=m_query & m_v)


@triton.jit
def _load_queries(
    p_grads, p_tile, p_times, i_start, i_query, distance, length, m_v,
    DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """g_P, g_T, the rows of P and the times of the events after a step of queries, ``distance`` blocks from the keys."""
    m_grad = (i_query < length)[:, None] & m_v
    b_gp = tl.load(p_grads + i_start * (3 * DV), mask=m_grad, other=0.0)
    b_gt = tl.load(p_grads + i_start * (3 * DV) + DV, mask=m_grad, other=0.0)
    b_p = tl.load(p_tile + distance * (BLOCK * BLOCK) + tl.multiple_of(i_start % BLOCK, STEP) * BLOCK)
    return b_gp, b_gt, b_p, tl.load(p_times + i_query + 1, mask=i_query < length, other=0)


@triton.jit(do_not_specialize=SIZES)
def bias_value_kernel(
    p_grad, p_bias_dv, p_offsets, p_times, p_ts_weights, p_cells, p_selects, p_codes, p_positions, p_items,
    num_tokens, num_groups, column_blocks, num_blocks,
    DV: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_item = tl.program_id(0) // column_blocks
    i_sequence, i_block, i_row, wide, start, length = load_item(p_items, i_item, p_offsets)
    if (i_sequence < 0) | (wide != (p_times.dtype.element_ty == tl.int64)):
        return
    dtype: tl.constexpr = p_grad.dtype.element_ty
    i_column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    i_key, i_step, i_tile = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP), tl.arange(0, BLOCK)
    m_key, m_v = (i_key < length)[:, None], column_mask(i_column, num_groups, DV)
    p_times += start + i_sequence
    key_times = tl.load(p_times + i_key, mask=i_key < length, other=0)
    p_grads = column_pointers(p_grad, i_column, num_tokens, start + i_step, 3 * DV, DV)
    p_tile = p_positions + i_step[:, None] * BLOCK + i_tile[None, :]
    p_codes += i_row * num_blocks + i_block  # the code of the tile on the diagonal
    b_dv = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for i_start in range(i_block * BLOCK + BLOCK, length, STEP):
        i_query = i_start + i_step
        distance = i_start // BLOCK - i_block
        b_gp, b_gt, b_p, next_times = _load_queries(
            p_grads, p_tile, p_times, i_start, i_query, distance, length, m_v, DV, BLOCK, STEP
        )
        b_dv = tl.dot(tl.trans(b_p), b_gp, b_dv, input_precision=PRECISION)
        code = tl.load(p_codes + distance * num_blocks).to(tl.int32)
        if code >= 0:
            threshold, low, high = selected_weights(p_selects, code, dtype)
            b_t = tl.where((next_times - threshold)[None, :] >= key_times[:, None], high, low)
        else:
            b_t = time_weights(next_times[None, :] - key_times[:, None], p_cells, p_ts_weights, dtype)
        b_dv = tl.dot(b_t, b_gt, b_dv, input_precision=PRECISION)
    for i_start in range(i_block * BLOCK, i_block * BLOCK + BLOCK, STEP):
        i_query = i_start + i_step
        b_gp, b_gt, b_p, next_times = _load_queries(
            p_grads, p_tile, p_times, i_start, i_query, 0, length, m_v, DV, BLOCK, STEP
        )
        b_dv = tl.dot(tl.trans(b_p), b_gp, b_dv, input_precision=PRECISION)
        b_t = time_weights(next_times[None, :] - key_times[:, None], p_cells, p_ts_weights, dtype)
        b_t = tl.where(i_key[:, None] <= i_query[None, :], b_t, tl.zeros_like(b_t))
        b_dv = tl.dot(b_t, b_gt, b_dv, input_precision=PRECISION)
    p_store = column_pointers(p_bias_dv, i_column, num_tokens, start + i_key, DV, DV)
    tl.store(p_store, b_dv, mask=m_key & m_v)


@triton.jit(do_not_specialize=SIZES)
def value_sums_kernel(
    p_v, p_sums, p_offsets, p_items, num_tokens, num_groups, column_blocks,
    DV: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, i_row, _, start, length = load_item(p_items, tl.program_id(0) // column_blocks, p_offsets)
    if i_sequence < 0:
        return
    i_column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    i_key = i_block * BLOCK + tl.arange(0, BLOCK)
    m_v = (i_key < length)[:, None] & column_mask(i_column, num_groups, DV)
    b_v = tl.load(column_pointers(p_v, i_column, num_tokens, start + i_key, DV, DV), mask=m_v, other=0.0)
    tl.store(p_sums + i_row * (column_blocks * COLUMNS) + i_column, tl.sum(b_v.to(tl.float32), 0))


@triton.jit
def _weights_gradient(
    p_grad, p_v, query, key, start, length, num_tokens, num_groups,
    DV: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_G g vᵀ of the tile that starts at ``query`` and ``key``: (queries, keys), zeros beyond the end of the sequence."""
    i_row = tl.arange(0, BLOCK)
    b_dw = tl.zeros([BLOCK, BLOCK], tl.float32)
    for c in tl.static_range(COLUMN_BLOCKS):
        i_column = c * COLUMNS + tl.arange(0, COLUMNS)
        m_v = column_mask(i_column, num_groups, DV)
        # The first term of each address is the same for all tiles of a program.
        p_g = column_pointers(p_grad, i_column, num_tokens, i_row, 3 * DV, DV) + (start + query) * (3 * DV)
        b_g = tl.load(p_g, mask=(i_row < length - query)[:, None] & m_v, other=0.0)
        p_value = column_pointers(p_v, i_column, num_tokens, i_row, DV, DV) + (start + key) * DV
        b_v = tl.load(p_value, mask=(i_row < length - key)[:, None] & m_v, other=0.0)
        b_dw = tl.dot(b_g, tl.trans(b_v), b_dw, input_precision=PRECISION)
    return b_dw


@triton.jit
def _add_histogram(b_sum, b_dt, seconds, lowest, highest, p_thresholds):
    """Adds to ``b_sum`` the sum of ``b_dt`` in each time bucket of a tile, from ``lowest`` to ``highest``.

    The sum in a bucket is the sum from its threshold upwards minus the sum from the next threshold upwards.
    """
    i_bucket = tl.arange(0, 256)
    x = tl.abs(seconds.to(tl.float32))
    total = tl.sum(b_dt)
    for i_next in range(lowest + 1, highest + 1):
        above = tl.sum(tl.where(x >= tl.load(p_thresholds + i_next), b_dt, 0.0))
        b_sum += tl.where(i_bucket == i_next - 1, total - above, 0.0)
        total = above
    return b_sum + tl.where(i_bucket == highest, total, 0.0)


@triton.jit
def _bucket(x, p_thresholds):
    """The time bucket of one |Δ|, a float32."""
    i_bucket = tl.arange(0, 256)
    threshold = tl.load(p_thresholds + i_bucket, mask=(i_bucket > 0) & (i_bucket < 129), other=float("inf"))
    return tl.sum((x >= threshold).to(tl.int32))


@triton.jit
def _add_single_bucket_tiles(
    b_sum, p_grad, p_sums, p_codes, i_query, i_block, i_row, start, length, num_tokens, num_groups,
    DV: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds ⟨Σ g_T, Σ v⟩ of each tile of one bucket to ``b_sum``."""
    i_bucket, i_tile = tl.arange(0, 256), tl.arange(0, 32)
    for i_first in range(0, i_block, 32):
        code = tl.load(p_codes + i_first + i_tile, mask=i_first + i_tile < i_block, other=-1).to(tl.int32)
        single = code >= 129
        total = tl.zeros([32], tl.float32)
        for c in tl.static_range(COLUMN_BLOCKS):
            i_column = c * COLUMNS + tl.arange(0, COLUMNS)
            m_g = (i_query < length)[:, None] & column_mask(i_column, num_groups, DV)
            p_g = column_pointers(p_grad, i_column, num_tokens, start + i_query, 3 * DV, DV)
            g_sum = tl.sum(tl.load(p_g, mask=m_g, other=0.0).to(tl.float32), 0)
            i_value = i_row - i_block + i_first + i_tile
            p_value = p_sums + i_value[:, None] * (COLUMN_BLOCKS * COLUMNS) + i_column[None, :]
            v_sum = tl.load(p_value, mask=single[:, None], other=0.0)
            total += tl.sum(v_sum * g_sum[None, :], 1)
        m_present = single[None, :] & (i_bucket[:, None] == code[None, :] - 129)
        b_sum += tl.sum(tl.where(m_present, total[None, :], 0.0), 1)
    return b_sum


@triton.jit(do_not_specialize=SIZES)
def time_gradient_kernel(
    p_v, p_grad, p_sums, p_partial, p_offsets, p_times, p_thresholds, p_codes, p_tiles, p_tile_counts, p_items,
    num_tokens, num_groups, num_blocks,
    DV: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_item = tl.program_id(0)
    i_sequence, i_block, i_row, wide, start, length = load_item(p_items, i_item, p_offsets)
    # The first launch also handles padding, whose partial sums are zeros.
    if ((i_sequence >= 0) & wide) != (p_times.dtype.element_ty == tl.int64):
        return
    p_grad += DV
    i_bucket, b_sum = tl.arange(0, 256), tl.zeros([256], tl.float32)
    if i_sequence >= 0:
        i_query = i_block * BLOCK + tl.arange(0, BLOCK)
        p_times += start + i_sequence
        p_codes += i_row * num_blocks
        next_times = tl.load(p_times + i_query + 1, mask=i_query < length, other=0)
        for i_tile in range(0, tl.load(p_tile_counts + i_row)):
            i_key_block = tl.load(p_tiles + i_row * num_blocks + i_tile).to(tl.int32)
            i_key = i_key_block * BLOCK + tl.arange(0, BLOCK)
            b_dt = _weights_gradient(
                p_grad, p_v, i_block * BLOCK, i_key_block * BLOCK, start, length, num_tokens, num_groups,
                DV, COLUMNS, COLUMN_BLOCKS, BLOCK, PRECISION,
            )  # fmt: skip
            seconds = next_times[:, None] - tl.load(p_times + i_key)[None, :]
            code = tl.load(p_codes + i_key_block).to(tl.int32)
            lowest, highest = code - 1, code
            if code < 0:
                lowest, highest = (-1 - code) // 129, (-1 - code) % 129
            b_sum = _add_histogram(b_sum, b_dt, seconds, lowest, highest, p_thresholds)
        i_key = i_query
        b_dt = _weights_gradient(
            p_grad, p_v, i_block * BLOCK, i_block * BLOCK, start, length, num_tokens, num_groups,
            DV, COLUMNS, COLUMN_BLOCKS, BLOCK, PRECISION,
        )  # fmt: skip
        seconds = next_times[:, None] - tl.load(p_times + i_key, mask=i_key < length, other=0)[None, :]
        m_tile = (i_key[None, :] <= i_query[:, None]) & (i_query[:, None] < length)
        x = tl.abs(seconds.to(tl.float32))
        lowest = _bucket(tl.min(tl.where(m_tile, x, float("inf"))), p_thresholds)
        highest = _bucket(tl.max(tl.where(m_tile, x, 0.0)), p_thresholds)
        b_sum = _add_histogram(b_sum, tl.where(m_tile, b_dt, 0.0), seconds, lowest, highest, p_thresholds)
        b_sum = _add_single_bucket_tiles(
            b_sum, p_grad, p_sums, p_codes, i_query, i_block, i_row, start, length, num_tokens, num_groups,
            DV, COLUMNS, COLUMN_BLOCKS,
        )  # fmt: skip
    tl.store(p_partial + i_item.to(tl.int64) * 129 + i_bucket, b_sum, mask=i_bucket < 129)


@triton.jit(do_not_specialize=SIZES)
def position_gradient_kernel(
    p_v, p_grad, p_partial, p_offsets, p_items, p_counts, num_tokens, num_groups, splits,
    DV: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_distance = tl.program_id(0) // splits
    # Items are in descending order of block number, so those at least i_distance blocks from the start come first.
    count = tl.load(p_counts + i_distance)
    i_row = tl.arange(0, BLOCK)
    b_dp = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i_item in range(tl.program_id(0) % splits, count, splits):
        _, i_block, _, _, start, length = load_item(p_items, i_item, p_offsets)
        b_dp += _weights_gradient(
            p_grad, p_v, i_block * BLOCK, (i_block - i_distance) * BLOCK, start, length, num_tokens, num_groups,
            DV, COLUMNS, COLUMN_BLOCKS, BLOCK, PRECISION,
        )  # fmt: skip
    p_store = p_partial + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + i_row[:, None] * BLOCK + i_row[None, :]
    tl.store(p_store, b_dp)
