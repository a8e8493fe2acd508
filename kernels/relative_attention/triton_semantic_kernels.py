"""Triton kernels of the semantic channel, A_ij = SiLU(q_i·k_j) / N: forward, dq, and dk with dv.

forward   has one program per (query block, group), which computes S = q kᵀ and A v.
dq        has one program per (query block, group), which computes S, g_A vᵀ and dS k.
dk, dv    has one program per (key block, group), which computes S, g_A vᵀ, dSᵀ q and Aᵀ g_A in transposed tiles and adds the
          part of the bias channels to dv.

q, or in the last kernel k, is halved when it is loaded, which is exact: SiLU and its slope are functions of S / 2
(`triton_tiles`). Only tiles that touch the diagonal are masked. Rows beyond the end of a sequence are zeros and add nothing.
1/N is applied once per row.

Layout: q, k (G, T, dqk), v (G, T, dv), out and grad (G, T, 3·dv) are contiguous; addresses are int64. `work_plan.py` describes
the work items, `triton_tiles` has the legend.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.relative_attention.triton_tiles import (
    column_mask,
    column_pointers,
    load_columns,
    load_item,
    silu,
    silu_gradient,
)

SIZES = ["num_tokens", "max_seq_len", "num_groups"]


@triton.jit
def _load_halved(p, i_column, row, m_row, WIDTH: tl.constexpr):
    """Half of a block (rows, columns) of q or k."""
    b = tl.load(
        column_pointers(p, i_column, 0, row, WIDTH, WIDTH), mask=m_row & column_mask(i_column, 1, WIDTH), other=0.0
    )
    return (b.to(tl.float32) * 0.5).to(b.dtype)


@triton.jit
def _load_keys(
    p_keys, p_values, i_start, i_key, length, m_qk, m_v, DIAGONAL: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr
):
    """k and v of a step of keys. Only in tiles on the DIAGONAL can a key lie beyond the end of the sequence."""
    if DIAGONAL:
        m_key = (i_key < length)[:, None]
        b_k = tl.load(p_keys + i_start * DQK, mask=m_key & m_qk, other=0.0)
        return b_k, tl.load(p_values + i_start * DV, mask=m_key & m_v, other=0.0)
    else:
        b_k = load_columns(p_keys + i_start * DQK, m_qk, triton.next_power_of_2(max(DQK, 16)) == DQK)
        return b_k, load_columns(p_values + i_start * DV, m_v, triton.next_power_of_2(max(DV, 16)) == DV)


@triton.jit
def _forward_step(
    out, b_q, p_keys, p_values, i_query, i_start, i_step, length, m_qk, m_v,
    DIAGONAL: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds A v of a step of keys to ``out``."""
    i_key = i_start + i_step
    b_k, b_v = _load_keys(p_keys, p_values, i_start, i_key, length, m_qk, m_v, DIAGONAL, DQK, DV)
    b_a = silu(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), b_q.dtype == tl.float32)
    if DIAGONAL:
        b_a = tl.where(i_key[None, :] <= i_query[:, None], b_a, 0.0)
    return tl.dot(b_a.to(b_v.dtype), b_v, out, input_precision=PRECISION)


@triton.jit
def _query_step(
    b_dq, b_q, b_g, p_keys, p_values, i_query, i_start, i_step, length, m_qk, m_v,
    DIAGONAL: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds dS k of a step of keys to ``b_dq``."""
    i_key = i_start + i_step
    b_k, b_v = _load_keys(p_keys, p_values, i_start, i_key, length, m_qk, m_v, DIAGONAL, DQK, DV)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_da = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    b_ds = silu_gradient(b_s, b_da, b_q.dtype == tl.float32)
    if DIAGONAL:
        b_ds = tl.where(i_key[None, :] <= i_query[:, None], b_ds, 0.0)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _key_step(
    b_dk, b_dv, b_k, b_v, p_queries, p_grads, i_key, i_start, i_step, length, m_qk, m_v,
    DIAGONAL: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds dSᵀ q and Aᵀ g_A of a step of queries to ``b_dk`` and ``b_dv``."""
    i_query = i_start + i_step
    b_q = tl.load(p_queries + i_start * DQK, mask=(i_query < length)[:, None] & m_qk, other=0.0)
    b_g = tl.load(p_grads + i_start * (3 * DV), mask=(i_query < length)[:, None] & m_v, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_da = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
    exact: tl.constexpr = b_k.dtype == tl.float32
    b_a, b_ds = silu(b_s, exact), silu_gradient(b_s, b_da, exact)
    if DIAGONAL:
        m_tile = i_key[:, None] <= i_query[None, :]
        b_a, b_ds = tl.where(m_tile, b_a, 0.0), tl.where(m_tile, b_ds, 0.0)
    b_dv = tl.dot(b_a.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv


@triton.jit(do_not_specialize=SIZES)
def semantic_forward_kernel(
    p_q, p_k, p_v, p_out, p_offsets, p_items, num_tokens, max_seq_len, num_groups,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, _, _, start, length = load_item(p_items, tl.program_id(0) // num_groups, p_offsets)
    if i_sequence < 0:
        return
    i_group = tl.program_id(0) % num_groups
    qk_width: tl.constexpr = triton.next_power_of_2(max(DQK, 16))
    v_width: tl.constexpr = triton.next_power_of_2(max(DV, 16))
    i_query, i_step = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
    i_qk, i_v = tl.arange(0, qk_width), tl.arange(0, v_width)
    m_query, m_qk, m_v = (i_query < length)[:, None], column_mask(i_qk, 1, DQK), column_mask(i_v, 1, DV)
    first = tl.cast(i_group, tl.int64) * num_tokens + start
    b_q = _load_halved(p_q, i_qk, first + i_query, m_query, DQK)
    p_keys = column_pointers(p_k, i_qk, 0, first + i_step, DQK, DQK)
    p_values = column_pointers(p_v, i_v, 0, first + i_step, DV, DV)
    out = tl.zeros([BLOCK, v_width], tl.float32)
    unmasked = i_block * BLOCK // STEP * STEP
    for i_start in range(0, unmasked, STEP):
        out = _forward_step(
            out, b_q, p_keys, p_values, i_query, i_start, i_step, length, m_qk, m_v, False, DQK, DV, PRECISION
        )
    for i_start in range(unmasked, i_block * BLOCK + BLOCK, STEP):
        out = _forward_step(
            out, b_q, p_keys, p_values, i_query, i_start, i_step, length, m_qk, m_v, True, DQK, DV, PRECISION
        )
    p_store = column_pointers(p_out + 2 * DV, i_v, 0, first + i_query, 3 * DV, DV)
    tl.store(p_store, (out / max_seq_len).to(p_out.dtype.element_ty), mask=m_query & m_v)


@triton.jit(do_not_specialize=SIZES)
def semantic_query_kernel(
    p_q, p_k, p_v, p_grad, p_dq, p_offsets, p_items, num_tokens, max_seq_len, num_groups,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, _, _, start, length = load_item(p_items, tl.program_id(0) // num_groups, p_offsets)
    if i_sequence < 0:
        return
    i_group = tl.program_id(0) % num_groups
    qk_width: tl.constexpr = triton.next_power_of_2(max(DQK, 16))
    v_width: tl.constexpr = triton.next_power_of_2(max(DV, 16))
    i_query, i_step = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
    i_qk, i_v = tl.arange(0, qk_width), tl.arange(0, v_width)
    m_query, m_qk, m_v = (i_query < length)[:, None], column_mask(i_qk, 1, DQK), column_mask(i_v, 1, DV)
    first = tl.cast(i_group, tl.int64) * num_tokens + start
    b_q = _load_halved(p_q, i_qk, first + i_query, m_query, DQK)
    b_g = tl.load(column_pointers(p_grad + 2 * DV, i_v, 0, first + i_query, 3 * DV, DV), mask=m_query & m_v, other=0.0)
    p_keys = column_pointers(p_k, i_qk, 0, first + i_step, DQK, DQK)
    p_values = column_pointers(p_v, i_v, 0, first + i_step, DV, DV)
    b_dq = tl.zeros([BLOCK, qk_width], tl.float32)
    unmasked = i_block * BLOCK // STEP * STEP
    for i_start in range(0, unmasked, STEP):
        b_dq = _query_step(
            b_dq, b_q, b_g, p_keys, p_values, i_query, i_start, i_step, length, m_qk, m_v, False, DQK, DV, PRECISION
        )
    for i_start in range(unmasked, i_block * BLOCK + BLOCK, STEP):
        b_dq = _query_step(
            b_dq, b_q, b_g, p_keys, p_values, i_query, i_start, i_step, length, m_qk, m_v, True, DQK, DV, PRECISION
        )
    p_store = column_pointers(p_dq, i_qk, 0, first + i_query, DQK, DQK)
    tl.store(p_store, (b_dq * (0.5 / max_seq_len)).to(p_dq.dtype.element_ty), mask=m_query & m_qk)


@triton.jit(do_not_specialize=SIZES)
def semantic_key_kernel(
    p_q, p_k, p_v, p_grad, p_bias_dv, p_dk, p_dv, p_offsets, p_items, num_tokens, max_seq_len, num_groups,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_sequence, i_block, _, _, start, length = load_item(p_items, tl.program_id(0) // num_groups, p_offsets)
    if i_sequence < 0:
        return
    i_group = tl.program_id(0) % num_groups
    qk_width: tl.constexpr = triton.next_power_of_2(max(DQK, 16))
    v_width: tl.constexpr = triton.next_power_of_2(max(DV, 16))
    i_key, i_step = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
    i_qk, i_v = tl.arange(0, qk_width), tl.arange(0, v_width)
    m_key, m_qk, m_v = (i_key < length)[:, None], column_mask(i_qk, 1, DQK), column_mask(i_v, 1, DV)
    first = tl.cast(i_group, tl.int64) * num_tokens + start
    b_k = _load_halved(p_k, i_qk, first + i_key, m_key, DQK)
    b_v = tl.load(column_pointers(p_v, i_v, 0, first + i_key, DV, DV), mask=m_key & m_v, other=0.0)
    p_queries = column_pointers(p_q, i_qk, 0, first + i_step, DQK, DQK)
    p_grads = column_pointers(p_grad + 2 * DV, i_v, 0, first + i_step, 3 * DV, DV)
    b_dk = tl.zeros([BLOCK, qk_width], tl.float32)
    b_dv = tl.zeros([BLOCK, v_width], tl.float32)
    unmasked = i_block * BLOCK + (BLOCK + STEP - 1) // STEP * STEP
    for i_start in range(unmasked, length, STEP):
        b_dk, b_dv = _key_step(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_queries,
            p_grads,
            i_key,
            i_start,
            i_step,
            length,
            m_qk,
            m_v,
            False,
            DQK,
            DV,
            PRECISION,
        )
    for i_start in range(i_block * BLOCK, unmasked, STEP):
        b_dk, b_dv = _key_step(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_queries,
            p_grads,
            i_key,
            i_start,
            i_step,
            length,
            m_qk,
            m_v,
            True,
            DQK,
            DV,
            PRECISION,
        )
    p_store = column_pointers(p_dk, i_qk, 0, first + i_key, DQK, DQK)
    tl.store(p_store, (b_dk * (0.5 / max_seq_len)).to(p_dk.dtype.element_ty), mask=m_key & m_qk)
    b_bias = tl.load(column_pointers(p_bias_dv, i_v, 0, first + i_key, DV, DV), mask=m_key & m_v, other=0.0)
    p_store = column_pointers(p_dv, i_v, 0, first + i_key, DV, DV)
    tl.store(p_store, (b_dv / max_seq_len + b_bias).to(p_dv.dtype.element_ty), mask=m_key & m_v)
