"""What the Triton kernels of relative attention share: work items, rows of groups side by side, SiLU, time weights.

Legend: L length of a sequence; i_ indices, m_ masks, p_ pointers, b_ blocks of values. A padded width is the next power of
two of a width, at least 16. Columns are those of all groups side by side, each group padded.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.backend import interpreting

# Triton's interpreter runs no PTX.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def load_item(p_items, i_item, p_offsets):
    """Sequence, block, row of the plan's tables, whether times span 2³¹ s, first token and length; sequence −1: no work."""
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
    """(rows, columns): where the columns of each token stand in (G, T, stride)."""
    width: tl.constexpr = triton.next_power_of_2(max(WIDTH, 16))
    group = (i_column // width).to(tl.int64) * num_tokens
    return p + (group[None, :] + token[:, None]) * stride + (i_column % width)[None, :]


@triton.jit
def column_mask(i_column, num_groups, WIDTH: tl.constexpr):
    """(1, columns): where a column is of a group that exists and no padding."""
    width: tl.constexpr = triton.next_power_of_2(max(WIDTH, 16))
    if width == WIDTH and i_column.shape[0] <= WIDTH:  # known when compiled, so that no mask is left
        return tl.full([1, i_column.shape[0]], True, tl.int1)
    else:
        return ((i_column % width < WIDTH) & (i_column // width < num_groups))[None, :]


@triton.jit
def load_columns(p_tile, m_column, ALL_COLUMNS: tl.constexpr):
    """A tile whose rows all exist; ALL_COLUMNS: its columns do too."""
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
    """SiLU(2h) = h + h·tanh(h): one special function. Its error of 2⁻¹¹ is an eighth of bfloat16's rounding."""
    if EXACT:
        return 2.0 * h / (1.0 + tl.exp(-2.0 * h))
    else:
        return h + h * tanh(h)


@triton.jit
def silu_gradient(h, b_da, EXACT: tl.constexpr):
    """2 SiLU'(2h) dA, in which 2 SiLU'(2h) = 1 + t + h (1 − t²), t = tanh(h)."""
    if EXACT:
        s = 1.0 / (1.0 + tl.exp(-2.0 * h))
        return b_da * (2.0 * s * (1.0 + 2.0 * h * (1.0 - s)))
    else:
        t = tanh(h)
        return b_da * (t + h * (1.0 - t * t)) + b_da


@triton.jit
def time_cells(seconds, p_cells):
    """Of a tile of time differences: whether |Δ| reaches the threshold of its cell, and what the cell holds.

    The thresholds decide, not the cells, so buckets are exact. A cell is a float32's sign, exponent and two bits of
    its mantissa, too narrow for two thresholds; see `time_tables.time_cells`.
    """
    x = seconds.to(tl.float32)
    b_cell = tl.load(p_cells + (x.to(tl.uint32, bitcast=True) >> 21))
    return tl.abs(x) >= b_cell.to(tl.int32).to(tl.float32, bitcast=True), (b_cell >> 32).to(tl.int32)


@triton.jit
def time_weights(seconds, p_cells, p_ts_weights, dtype: tl.constexpr):
    """T of a tile of any buckets. The cell holds the two weights, in float32 the lower bucket."""
    reached, held = time_cells(seconds, p_cells)
    if dtype == tl.float32:
        return tl.load(p_ts_weights + held + reached.to(tl.int32)).to(tl.float32)
    else:
        return tl.where(reached, held >> 16, held).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def selected_weights(p_selects, code, dtype: tl.constexpr):
    """Of a tile of at most two buckets: int32 threshold, weight below it and weight from it on."""
    threshold = tl.load(p_selects + 3 * code)
    low = tl.load(p_selects + 3 * code + 1)
    high = tl.load(p_selects + 3 * code + 2)
    if dtype == tl.float32:
        return threshold, low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        return threshold, low.to(tl.int16).to(dtype, bitcast=True), high.to(tl.int16).to(dtype, bitcast=True)
