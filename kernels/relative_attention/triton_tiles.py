"""Functions that the Triton kernels of relative attention share: work items, columns of groups, SiLU, time weights.

Legend: L length of a sequence; i_ indices, m_ masks, p_ pointers, b_ blocks of values. A padded width is the
smallest power of two that is at least the width and 16. Columns are those of all groups, side by side, each group padded.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.backend import interpreting

# Triton's interpreter cannot run PTX.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def load_item(p_items, i_item, p_offsets):
    """Sequence (−1: no work), block, row in the plan's tables, whether times span 2³¹ s, first token and length."""
    i_sequence = tl.load(p_items + 4 * i_item)
    i_block = tl.load(p_items + 4 * i_item + 1).to(tl.int32)
    i_row = tl.load(p_items + 4 * i_item + 2)
    wide = tl.load(p_items + 4 * i_item + 3) != 0
    safe = tl.maximum(i_sequence, 0)
    start = tl.load(p_offsets + safe)
    length = (tl.load(p_offsets + safe + 1) - start).to(tl.int32)
    return i_sequence, i_block, i_row, wide, start, length


@triton.jit
def column_pointers(p, i_column, num_tokens, token, stride, WIDTH: tl.constexpr):
    """(rows, columns): pointers to the columns of each token in (G, T, stride)."""
    width: tl.constexpr = triton.next_power_of_2(max(WIDTH, 16))
    group = (i_column // width).to(tl.int64) * num_tokens
    return p + (group[None, :] + token[:, None]) * stride + (i_column % width)[None, :]


@triton.jit
def column_mask(i_column, num_groups, WIDTH: tl.constexpr):
    """(1, columns): whether a column belongs to an existing group and is not padding."""
    width: tl.constexpr = triton.next_power_of_2(max(WIDTH, 16))
    if width == WIDTH and i_column.shape[0] <= WIDTH:  # known at compile time, so the compiler removes the mask
        return tl.full([1, i_column.shape[0]], True, tl.int1)
    else:
        return ((i_column % width < WIDTH) & (i_column // width < num_groups))[None, :]


@triton.jit
def load_columns(p_tile, m_column, ALL_COLUMNS: tl.constexpr):
    """Loads a tile whose rows all exist; with ALL_COLUMNS its columns do too."""
    if ALL_COLUMNS:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=m_column, other=0.0)


@triton.jit
def tanh(x):
    if INTERPRETED:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(h, EXACT: tl.constexpr):
    """SiLU(2h) = h + h·tanh(h), with one special function whose error, 2⁻¹¹, is an eighth of bfloat16's rounding."""
    if EXACT:
        return 2.0 * h / (1.0 + tl.exp(-2.0 * h))
    else:
        return h + h * tanh(h)


@triton.jit
def silu_gradient(h, b_da, EXACT: tl.constexpr):
    """2 SiLU'(2h) dA, where 2 SiLU'(2h) = 1 + t + h (1 − t²) and t = tanh(h)."""
    if EXACT:
        s = 1.0 / (1.0 + tl.exp(-2.0 * h))
        return b_da * (2.0 * s * (1.0 + 2.0 * h * (1.0 - s)))
    else:
        t = tanh(h)
        return b_da * (t + h * (1.0 - t * t)) + b_da


@triton.jit
def time_cells(seconds, p_cells):
    """For a tile of time differences: whether |Δ| reaches the threshold of its cell, and the upper half of the cell.

    Buckets are exact, because thresholds separate them, not cells (`time_tables.time_cells`).
    """
    x = seconds.to(tl.float32)
    b_cell = tl.load(p_cells + (x.to(tl.uint32, bitcast=True) >> 21))
    return tl.abs(x) >= b_cell.to(tl.int32).to(tl.float32, bitcast=True), (b_cell >> 32).to(tl.int32)


@triton.jit
def time_weights(seconds, p_cells, p_ts_weights, dtype: tl.constexpr):
    """T of a tile with any buckets. A cell contains the two weights or, in float32, the lower bucket."""
    reached, held = time_cells(seconds, p_cells)
    if dtype == tl.float32:
        return tl.load(p_ts_weights + held + reached.to(tl.int32)).to(tl.float32)
    else:
        return tl.where(reached, held >> 16, held).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def selected_weights(p_selects, code, dtype: tl.constexpr):
    """For a tile of at most two buckets: the int32 threshold, the weight below it and the weight from it upwards."""
    threshold = tl.load(p_selects + 3 * code)
    low = tl.load(p_selects + 3 * code + 1)
    high = tl.load(p_selects + 3 * code + 2)
    if dtype == tl.float32:
        return threshold, low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        return threshold, low.to(tl.int16).to(dtype, bitcast=True), high.to(tl.int16).to(dtype, bitcast=True)
