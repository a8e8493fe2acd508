"""Triton kernels of the gated expert FFN for widths whose rows fit on chip: forward, and backward by recomputation.

forward   has one program per block of rows of one expert. It keeps x and takes the hidden width in steps; each step computes
          x W_1, x W_3, SiLU, their product and its contribution to the output. Hidden values stay on chip.
d x       takes the same steps. Each computes both products again and dy W_2ᵀ, and adds d a W_1ᵀ + d b W_3ᵀ.
d W       has one program per (chunk of an expert's rows, step of the hidden width). It keeps the weights of the step and takes
          the rows block by block. It sums xᵀ d a, xᵀ d b and hᵀ dy on chip and writes them to the chunk's own memory.
sum       has one program per (expert, part of its weights), which adds the sums of the chunks in order. Without atomics,
          results repeat bit for bit.

With routing, the kernels gather the row of a slot as they read it and write its weighted result to the place of its choice. dy
W_2ᵀ also gives the gradient of the weight. So neither sorted copies nor unweighted results are stored.

A program finds its expert from the offsets, whose values never reach the host. The slots of a chunk or block belong to one
expert; programs beyond the true number of blocks end at once. Slot numbers are int32, addresses int64.

Legend: a slot is a row or, with routing, one of the R·k choices sorted by expert; d width, E experts, f hidden width; i_ indices,
m_ masks, p_ pointers, b_ blocks of values.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.fast_math import sigmoid_and_silu

# These integers vary from batch to batch, or gain nothing from being multiples of 16, and a second compilation would stall
# training. hidden_dim, size and the strides stay specialised, because multiples of 16 permit wide loads.
COUNTS = ["num_experts", "chunk", "num_steps", "num_parts", "left_steps", "right_steps"]


@triton.jit
def locate(p_offsets, i_item, num_experts, block, EXPERTS: tl.constexpr):
    """Expert, first row and end of the expert's rows for the i-th block; if there is no such block, expert ≥ num_experts."""
    i_expert = tl.arange(0, EXPERTS)
    m_expert = i_expert < num_experts
    start = tl.load(p_offsets + i_expert, mask=m_expert, other=0).to(tl.int32)
    end = tl.load(p_offsets + i_expert + 1, mask=m_expert, other=0).to(tl.int32)
    blocks = (end - start + block - 1) // block
    expert = tl.sum((tl.cumsum(blocks, 0) <= i_item).to(tl.int32), 0)
    before = tl.sum(tl.where(i_expert < expert, blocks, 0), 0)
    safe = tl.minimum(expert, num_experts - 1)
    first = tl.load(p_offsets + safe).to(tl.int32) + (i_item - before) * block
    return expert, first, tl.load(p_offsets + safe + 1).to(tl.int32)


@triton.jit
def load_tile(p, row, m_row, column, columns_end, stride):
    """(rows, columns) of a row-major matrix, with zeros if ``m_row`` is false and beyond the last column."""
    m_load = m_row[:, None] & (column[None, :] < columns_end)
    return tl.load(p + row[:, None].to(tl.int64) * stride + column[None, :], mask=m_load, other=0.0)


@triton.jit
def store_tile(p, value, row, m_row, column, columns_end, stride):
    m_store = m_row[:, None] & (column[None, :] < columns_end)
    p_store = p + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(p_store, value.to(p.dtype.element_ty), mask=m_store)


@triton.jit
def load_rows(p, row, m_row, column, D: tl.constexpr):
    """As `load_tile`, for a (rows, D) matrix. Columns need no mask if D is a multiple of the tile's width."""
    m_load = m_row[:, None]
    if tl.constexpr(D) % column.shape[0]:
        m_load &= column[None, :] < D
    return tl.load(p + row[:, None].to(tl.int64) * D + column[None, :], mask=m_load, other=0.0)


@triton.jit
def load_weights(p, i_expert, i_column, i_hidden, hidden_dim, D: tl.constexpr):
    """(d, hidden) of W_1 or W_3."""
    m_load = i_hidden[None, :] < hidden_dim
    if tl.constexpr(D) % i_column.shape[0]:
        m_load &= i_column[:, None] < D
    p_load = p + i_expert.to(tl.int64) * D * hidden_dim + i_column[:, None] * hidden_dim + i_hidden[None, :]
    return tl.load(p_load, mask=m_load, other=0.0)


@triton.jit
def load_weights_down(p, i_expert, i_hidden, i_column, hidden_dim, D: tl.constexpr):
    """(hidden, d) of W_2."""
    return load_rows(p + i_expert.to(tl.int64) * D * hidden_dim, i_hidden, i_hidden < hidden_dim, i_column, D)


@triton.jit
def load_expert(p_w1, p_w3, p_w2, expert, i_column, i_hidden, hidden_dim, D: tl.constexpr):
    """One expert's W_1 and W_3 (d, hidden) and W_2 (hidden, d) for a step of hidden units."""
    b_w1 = load_weights(p_w1, expert, i_column, i_hidden, hidden_dim, D)
    b_w3 = load_weights(p_w3, expert, i_column, i_hidden, hidden_dim, D)
    return b_w1, b_w3, load_weights_down(p_w2, expert, i_hidden, i_column, hidden_dim, D)


@triton.jit
def routed_rows(p_order, p_choice_weights, i_slot, m_slot, TOP_K: tl.constexpr):
    """For each slot, the row that it reads, the place of its result, and its weight.

    Without routing (TOP_K 0) a slot is a row. With routing, slot i is choice order[i] = row · k + j.
    """
    if TOP_K:
        i_choice = tl.load(p_order + i_slot, mask=m_slot, other=0).to(tl.int32)
        weight = tl.load(p_choice_weights + i_choice, mask=m_slot, other=0.0)
        return i_choice // TOP_K, i_choice, weight
    return i_slot, i_slot, tl.full(i_slot.shape, 1.0, tl.float32)


@triton.jit
def hidden_gradients(a, b, d_hidden, APPROXIMATE: tl.constexpr):
    """(d a, d b, h) of h = SiLU(a) ⊙ b, float32."""
    s, silu = sigmoid_and_silu(a, APPROXIMATE)
    return d_hidden * b * (s + (silu - silu * s)), d_hidden * silu, silu * b


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x, p_y, p_order, p_choice_weights, p_offsets, p_w1, p_w3, p_w2, num_experts, hidden_dim,
    D: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    expert, first, end = locate(p_offsets, tl.program_id(0), num_experts, BLOCK, EXPERTS)
    if expert >= num_experts:
        return
    i_slot = first + tl.arange(0, BLOCK)
    m_slot = i_slot < end
    source, target, weight = routed_rows(p_order, p_choice_weights, i_slot, m_slot, TOP_K)
    i_column = tl.arange(0, triton.next_power_of_2(max(D, 16)))
    b_x = load_rows(p_x, source, m_slot, i_column, D)
    b_y = tl.zeros([BLOCK, triton.next_power_of_2(max(D, 16))], tl.float32)
    for i_start in range(0, hidden_dim, STEP):
        i_hidden = i_start + tl.arange(0, STEP)
        b_w1, b_w3, b_w2 = load_expert(p_w1, p_w3, p_w2, expert, i_column, i_hidden, hidden_dim, D)
        b_a = tl.dot(b_x, b_w1, input_precision=PRECISION)
        b_b = tl.dot(b_x, b_w3, input_precision=PRECISION)
        _, b_silu = sigmoid_and_silu(b_a, b_x.dtype == tl.bfloat16)
        b_y = tl.dot((b_silu * b_b).to(b_x.dtype), b_w2, b_y, input_precision=PRECISION)
    if TOP_K:
        b_y *= weight[:, None]
    store_tile(p_y, b_y, target, m_slot, i_column, D, D)


@triton.jit(do_not_specialize=COUNTS)
def backward_rows_kernel(
    p_x, p_grad, p_dx, p_d_choice, p_order, p_choice_weights, p_offsets, p_w1, p_w3, p_w2, num_experts, hidden_dim,
    D: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    expert, first, end = locate(p_offsets, tl.program_id(0), num_experts, BLOCK, EXPERTS)
    if expert >= num_experts:
        return
    i_slot = first + tl.arange(0, BLOCK)
    m_slot = i_slot < end
    source, target, weight = routed_rows(p_order, p_choice_weights, i_slot, m_slot, TOP_K)
    i_column = tl.arange(0, triton.next_power_of_2(max(D, 16)))
    b_x = load_rows(p_x, source, m_slot, i_column, D)
    b_g = load_rows(p_grad, source, m_slot, i_column, D)
    b_dx = tl.zeros([BLOCK, triton.next_power_of_2(max(D, 16))], tl.float32)
    d_choice = tl.zeros([BLOCK], tl.float32)
    for i_start in range(0, hidden_dim, STEP):
        i_hidden = i_start + tl.arange(0, STEP)
        b_w1, b_w3, b_w2 = load_expert(p_w1, p_w3, p_w2, expert, i_column, i_hidden, hidden_dim, D)
        b_a = tl.dot(b_x, b_w1, input_precision=PRECISION)
        b_b = tl.dot(b_x, b_w3, input_precision=PRECISION)
        b_dh = tl.dot(b_g, tl.trans(b_w2), input_precision=PRECISION)
        b_da, b_db, b_h = hidden_gradients(b_a, b_b, b_dh, b_x.dtype == tl.bfloat16)
        if TOP_K:
            # ⟨dy, h W_2⟩ = ⟨dy W_2ᵀ, h⟩: the weight's gradient needs no result of forward.
            d_choice += tl.sum(b_dh * b_h, 1)
        b_dx = tl.dot(b_da.to(b_x.dtype), tl.trans(b_w1), b_dx, input_precision=PRECISION)
        b_dx = tl.dot(b_db.to(b_x.dtype), tl.trans(b_w3), b_dx, input_precision=PRECISION)
    if TOP_K:
        b_dx *= weight[:, None]
    store_tile(p_dx, b_dx, target, m_slot, i_column, D, D)
    if TOP_K:
        tl.store(p_d_choice + target, d_choice, mask=m_slot)


@triton.jit(do_not_specialize=COUNTS)
def backward_weights_kernel(
    p_x, p_grad, p_dw1, p_dw3, p_dw2, p_order, p_choice_weights, p_offsets, p_w1, p_w3, p_w2,
    num_experts, hidden_dim, chunk, num_steps,
    D: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The steps of one chunk are neighbours, because they read the same rows.
    i_chunk = tl.program_id(0) // num_steps
    expert, first, end = locate(p_offsets, i_chunk, num_experts, chunk, EXPERTS)
    if expert >= num_experts:
        return
    end = tl.minimum(end, first + chunk)
    i_column = tl.arange(0, triton.next_power_of_2(max(D, 16)))
    i_hidden = (tl.program_id(0) % num_steps) * STEP + tl.arange(0, STEP)
    b_w1, b_w3, b_w2 = load_expert(p_w1, p_w3, p_w2, expert, i_column, i_hidden, hidden_dim, D)
    b_dw1 = tl.zeros([triton.next_power_of_2(max(D, 16)), STEP], tl.float32)
    b_dw3 = tl.zeros([triton.next_power_of_2(max(D, 16)), STEP], tl.float32)
    b_dw2 = tl.zeros([triton.next_power_of_2(max(D, 16)), STEP], tl.float32)
    for i_start in range(0, end - first, BLOCK):
        i_slot = first + i_start + tl.arange(0, BLOCK)
        m_slot = i_slot < end
        source, _, weight = routed_rows(p_order, p_choice_weights, i_slot, m_slot, TOP_K)
        b_x = load_rows(p_x, source, m_slot, i_column, D)
        b_g = load_rows(p_grad, source, m_slot, i_column, D)
        b_a = tl.dot(b_x, b_w1, input_precision=PRECISION)
        b_b = tl.dot(b_x, b_w3, input_precision=PRECISION)
        b_dh = tl.dot(b_g, tl.trans(b_w2), input_precision=PRECISION)
        if TOP_K:
            b_dh *= weight[:, None]
        b_da, b_db, b_h = hidden_gradients(b_a, b_b, b_dh, b_x.dtype == tl.bfloat16)
        if TOP_K:
            b_h *= weight[:, None]
        b_dw1 = tl.dot(tl.trans(b_x), b_da.to(b_x.dtype), b_dw1, input_precision=PRECISION)
        b_dw3 = tl.dot(tl.trans(b_x), b_db.to(b_x.dtype), b_dw3, input_precision=PRECISION)
        b_dw2 = tl.dot(tl.trans(b_g), b_h.to(b_x.dtype), b_dw2, input_precision=PRECISION)
    place = i_chunk.to(tl.int64) * D * hidden_dim
    m_column, m_hidden = i_column < D, i_hidden < hidden_dim
    store_tile(p_dw1 + place, b_dw1, i_column, m_column, i_hidden, hidden_dim, hidden_dim)
    store_tile(p_dw3 + place, b_dw3, i_column, m_column, i_hidden, hidden_dim, hidden_dim)
    store_tile(p_dw2 + place, tl.trans(b_dw2), i_hidden, m_hidden, i_column, D, D)


@triton.jit(do_not_specialize=COUNTS)
def sum_chunks_kernel(
    p_partial, p_sum, p_offsets, num_experts, size, chunk, num_parts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums (chunks, size) float32, ordered by expert, to (E, size); an expert without rows gets zeros."""
    expert = tl.program_id(0) // num_parts
    i_expert = tl.arange(0, EXPERTS)
    m_expert = i_expert < num_experts
    start = tl.load(p_offsets + i_expert, mask=m_expert, other=0)
    blocks = (tl.load(p_offsets + i_expert + 1, mask=m_expert, other=0) - start + chunk - 1) // chunk
    first = tl.sum(tl.where(i_expert < expert, blocks, 0), 0)
    last = first + tl.sum(tl.where(i_expert == expert, blocks, 0), 0)
    i_place = (tl.program_id(0) % num_parts) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i_chunk in range(first, last):
        total += tl.load(p_partial + i_chunk * size + i_place, mask=i_place < size, other=0.0)
    p_store = p_sum + expert.to(tl.int64) * size + i_place
    tl.store(p_store, total.to(p_sum.dtype.element_ty), mask=i_place < size)
