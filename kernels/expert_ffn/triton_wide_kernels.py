"""Triton kernels of the gated expert FFN in two passes, for widths whose rows do not fit on chip.

hidden    writes SiLU(x W_1) ⊙ (x W_3) of a (rows, hidden) tile to memory; in backward d a, d b and h.
product   multiplies rows by a matrix of their expert: h W_2, or d a W_1ᵀ + d b W_3ᵀ.
outer     computes xᵀ d a, xᵀ d b or hᵀ dy over a chunk of an expert's rows, for `triton_kernels.sum_chunks_kernel` to sum.

Programs, legend and determinism are those of `triton_kernels`.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.expert_ffn.triton_kernels import (
    COUNTS,
    hidden_gradients,
    load_rows,
    load_tile,
    load_weights,
    load_weights_down,
    locate,
    store_tile,
)
from kernels.fast_math import sigmoid_and_silu


@triton.jit(do_not_specialize=COUNTS)
def hidden_kernel(
    p_x, p_grad, p_h, p_da, p_db, p_offsets, p_w1, p_w3, p_w2, num_experts, hidden_dim, num_steps,
    D: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, INNER: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, first, end = locate(p_offsets, tl.program_id(0) // num_steps, num_experts, BLOCK, EXPERTS)
    if expert >= num_experts:
        return
    i_row = first + tl.arange(0, BLOCK)
    i_hidden = (tl.program_id(0) % num_steps) * STEP + tl.arange(0, STEP)
    m_row = i_row < end
    b_a = tl.zeros([BLOCK, STEP], tl.float32)
    b_b = tl.zeros([BLOCK, STEP], tl.float32)
    b_dh = tl.zeros([BLOCK, STEP], tl.float32)
    for i_start in range(0, D, INNER):
        i_inner = i_start + tl.arange(0, INNER)
        b_x = load_rows(p_x, i_row, m_row, i_inner, D)
        b_w1 = load_weights(p_w1, expert, i_inner, i_hidden, hidden_dim, D)
        b_w3 = load_weights(p_w3, expert, i_inner, i_hidden, hidden_dim, D)
        b_a = tl.dot(b_x, b_w1, b_a, input_precision=PRECISION)
        b_b = tl.dot(b_x, b_w3, b_b, input_precision=PRECISION)
        if BACKWARD:
            b_g = load_rows(p_grad, i_row, m_row, i_inner, D)
            b_w2 = load_weights_down(p_w2, expert, i_hidden, i_inner, hidden_dim, D)
            b_dh = tl.dot(b_g, tl.trans(b_w2), b_dh, input_precision=PRECISION)
    approximate: tl.constexpr = p_x.dtype.element_ty == tl.bfloat16
    if BACKWARD:
        b_da, b_db, b_h = hidden_gradients(b_a, b_b, b_dh, approximate)
        store_tile(p_da, b_da, i_row, m_row, i_hidden, hidden_dim, hidden_dim)
        store_tile(p_db, b_db, i_row, m_row, i_hidden, hidden_dim, hidden_dim)
    else:
        _, b_silu = sigmoid_and_silu(b_a, approximate)
        b_h = b_silu * b_b
    store_tile(p_h, b_h, i_row, m_row, i_hidden, hidden_dim, hidden_dim)


@triton.jit(do_not_specialize=COUNTS)
def product_kernel(
    p_left, p_left2, p_out, p_offsets, p_right, p_right2, num_experts, inner_dim, out_dim, inner_stride, out_stride,
    num_steps,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, INNER: tl.constexpr, PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = left · right (+ left2 · right2 with PAIR).

    Element (i, o) of an expert's right factor is at i · inner_stride + o · out_stride.
    """
    expert, first, end = locate(p_offsets, tl.program_id(0) // num_steps, num_experts, BLOCK, EXPERTS)
    if expert >= num_experts:
        return
    i_row = first + tl.arange(0, BLOCK)
    i_out = (tl.program_id(0) % num_steps) * STEP + tl.arange(0, STEP)
    weights = expert.to(tl.int64) * inner_dim * out_dim
    m_row = i_row < end
    b_out = tl.zeros([BLOCK, STEP], tl.float32)
    for i_start in range(0, inner_dim, INNER):
        i_inner = i_start + tl.arange(0, INNER)
        m_right = (i_inner[:, None] < inner_dim) & (i_out[None, :] < out_dim)
        place = weights + i_inner[:, None] * inner_stride + i_out[None, :] * out_stride
        b_left = load_tile(p_left, i_row, m_row, i_inner, inner_dim, inner_dim)
        b_right = tl.load(p_right + place, mask=m_right, other=0.0)
        b_out = tl.dot(b_left, b_right, b_out, input_precision=PRECISION)
        if PAIR:
            b_left = load_tile(p_left2, i_row, m_row, i_inner, inner_dim, inner_dim)
            b_right = tl.load(p_right2 + place, mask=m_right, other=0.0)
            b_out = tl.dot(b_left, b_right, b_out, input_precision=PRECISION)
    store_tile(p_out, b_out, i_row, m_row, i_out, out_dim, out_dim)


@triton.jit(do_not_specialize=COUNTS)
def outer_kernel(
    p_left, p_right, p_partial, p_offsets, num_experts, left_dim, right_dim, chunk, left_steps, right_steps,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0) // (left_steps * right_steps)
    i_tile = tl.program_id(0) % (left_steps * right_steps)
    expert, first, end = locate(p_offsets, i_chunk, num_experts, chunk, EXPERTS)
    if expert >= num_experts:
        return
    end = tl.minimum(end, first + chunk)
    i_left = (i_tile // right_steps) * STEP + tl.arange(0, STEP)
    i_right = (i_tile % right_steps) * STEP + tl.arange(0, STEP)
    b_sum = tl.zeros([STEP, STEP], tl.float32)
    for i_start in range(0, end - first, BLOCK):
        i_row = first + i_start + tl.arange(0, BLOCK)
        b_left = load_tile(p_left, i_row, i_row < end, i_left, left_dim, left_dim)
        b_right = load_tile(p_right, i_row, i_row < end, i_right, right_dim, right_dim)
        b_sum = tl.dot(tl.trans(b_left), b_right, b_sum, input_precision=PRECISION)
    place = i_chunk.to(tl.int64) * left_dim * right_dim
    store_tile(p_partial + place, b_sum, i_left, i_left < left_dim, i_right, right_dim, right_dim)
