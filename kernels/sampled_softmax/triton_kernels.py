"""Triton kernels of sampled softmax: forward and backward, without logits or gathered rows in device memory.

forward, d hidden   own negatives: one program per token takes STEP gathered rows at a time on vector units.
                    shared negatives: one program per BLOCK tokens of a group computes (BLOCK, STEP) tiles of logits on
                    tensor cores.
d items             entries (token, slot) are sorted by item and divided into pieces. One program per piece recomputes logits
                    and slopes from one row of items and gathered rows of hidden, and writes one partial row.
d negatives         shared negatives: one program per (group, split of its tokens, BLOCK negatives) writes BLOCK partial rows.
sums                one program per item adds its partial rows in the given order.

Every partial sum has its own place in memory, so gradients repeat bit for bit. Forward keeps the log-sum of each token's
logits, from which backward recomputes what it needs.

Layout: hidden (T, D) and items (U, D) are contiguous; addresses are int64; p_bias is None if items have no bias. Entry
t·slots + j is slot j of token t, and slot 0 is its target.

Legend: T tokens, D width, U items, n negatives; z logits; i_ indices, m_ masks, p_ pointers, b_ blocks of values.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.fast_math import exp2
from kernels.sampled_softmax.torch_form import MASKED_LOGIT

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MASKED = tl.constexpr(MASKED_LOGIT)
# These integers, and the alignment of pointers into larger tensors, vary from batch to batch. A second compilation for them would
# stall training.
VARYING = [
    "p_targets", "p_negatives", "p_grad",
    "num_tokens", "num_negatives", "num_items", "slots", "group_size", "token_blocks", "first_group", "splits",
    "split_tokens", "negative_blocks",
]  # fmt: skip
_LOWEST = tl.constexpr(-1e38)  # initial value of a running maximum; finite, so that the difference of two is a number


@triton.jit
def _columns(D: tl.constexpr):
    return tl.arange(0, triton.next_power_of_2(max(D, 16)))


@triton.jit
def _load_row(p, i_row, D: tl.constexpr):
    """(columns,) float32, with zeros beyond D."""
    i_column = _columns(D)
    return tl.load(p + tl.cast(i_row, tl.int64) * D + i_column, mask=i_column < D, other=0.0).to(tl.float32)


@triton.jit
def _load_rows(p, i_row, m_row, D: tl.constexpr):
    """(rows, columns), with zeros beyond D and in masked rows."""
    i_column = _columns(D)
    m_load = m_row[:, None] & (i_column[None, :] < D)
    return tl.load(p + tl.cast(i_row, tl.int64)[:, None] * D + i_column[None, :], mask=m_load, other=0.0)


@triton.jit
def _store_rows(p, value, i_row, m_row, D: tl.constexpr):
    i_column = _columns(D)
    p_store = p + tl.cast(i_row, tl.int64)[:, None] * D + i_column[None, :]
    tl.store(p_store, value.to(p.dtype.element_ty), mask=m_row[:, None] & (i_column[None, :] < D))


@triton.jit
def _offsets(p_bias, i_row, m_row, offset):
    """The offsets of the logits of these negatives, in the shape of ``i_row``; one number if items have no bias."""
    if p_bias is not None:
        offset += tl.load(p_bias + i_row, mask=m_row, other=0.0)
    return offset


@triton.jit
def _own_tile(p_items, p_negatives, p_bias, i_slot, num_negatives, b_h, target, scale, offset, D: tl.constexpr):
    """The rows (STEP, columns) and logits (STEP,) of the negatives; logits beyond n are −∞."""
    m_slot = i_slot < num_negatives
    i_row = tl.load(p_negatives + i_slot, mask=m_slot, other=0)
    b_e = _load_rows(p_items, i_row, m_slot, D).to(tl.float32)
    z = tl.sum(b_e * b_h[None, :], axis=1) * scale + _offsets(p_bias, i_row, m_slot, offset)
    z = tl.where(i_row == target, _MASKED, z)
    return b_e, tl.where(m_slot, z, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def forward_own_kernel(
    p_hidden, p_items, p_targets, p_negatives, p_bias, p_loss, p_log_sum, num_negatives, group_size, scale, offset,
    D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i_token = tl.cast(tl.program_id(0), tl.int64)
    b_h = _load_row(p_hidden, i_token, D)
    target = tl.load(p_targets + i_token)
    z_target = tl.sum(b_h * _load_row(p_items, target, D), axis=0) * scale
    p_negatives += (i_token // group_size) * num_negatives
    # Each row of the tile has its own maximum and sum; they are combined at the end.
    largest = tl.full([STEP], _LOWEST, tl.float32)
    total = tl.zeros([STEP], tl.float32)
    for start in range(0, num_negatives, STEP):
        i_slot = start + tl.arange(0, STEP)
        _, z = _own_tile(p_items, p_negatives, p_bias, i_slot, num_negatives, b_h, target, scale, offset, D)
        next_largest = tl.maximum(largest, z)
        total = total * tl.exp(largest - next_largest) + tl.exp(z - next_largest)
        largest = next_largest
    top = tl.maximum(tl.max(largest, axis=0), z_target)
    log_total = tl.log(tl.sum(total * tl.exp(largest - top), axis=0) + tl.exp(z_target - top))
    tl.store(p_loss + i_token, (top - z_target) + log_total)
    tl.store(p_log_sum + i_token, top + log_total)


@triton.jit(do_not_specialize=VARYING)
def backward_hidden_own_kernel(
    p_hidden, p_items, p_targets, p_negatives, p_bias, p_log_sum, p_grad, p_d_hidden,
    num_negatives, group_size, scale, offset,
    D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i_token = tl.cast(tl.program_id(0), tl.int64)
    i_column = _columns(D)
    b_h = _load_row(p_hidden, i_token, D)
    target = tl.load(p_targets + i_token)
    log_sum = tl.load(p_log_sum + i_token)
    p_negatives += (i_token // group_size) * num_negatives
    b_sum = tl.zeros([STEP, triton.next_power_of_2(max(D, 16))], tl.float32)
    for start in range(0, num_negatives, STEP):
        i_slot = start + tl.arange(0, STEP)
        b_e, z = _own_tile(p_items, p_negatives, p_bias, i_slot, num_negatives, b_h, target, scale, offset, D)
        b_sum += tl.exp(z - log_sum)[:, None] * b_e
    b_target = _load_row(p_items, target, D)
    slope = tl.exp(tl.sum(b_h * b_target, axis=0) * scale - log_sum) - 1.0
    b_d = (tl.sum(b_sum, axis=0) + slope * b_target) * (tl.load(p_grad + i_token) * scale)
    tl.store(p_d_hidden + i_token * D + i_column, b_d.to(p_d_hidden.dtype.element_ty), mask=i_column < D)


@triton.jit(do_not_specialize=VARYING)
def backward_items_kernel(
    p_hidden, p_items, p_targets, p_bias, p_log_sum, p_grad, p_partial, p_order, p_starts, p_pieces, p_piece_starts,
    num_items, slots, scale, offset,
    D: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i_piece = tl.program_id(0)
    i_item = tl.load(p_pieces + i_piece)
    if i_item >= num_items:  # the list of pieces has the greatest possible length
        return
    start = tl.load(p_starts + i_item) + (i_piece - tl.load(p_piece_starts + i_item)) * PIECE
    end = tl.minimum(start + PIECE, tl.load(p_starts + i_item + 1))
    if p_bias is not None:
        offset += tl.load(p_bias + i_item)
    b_e = _load_row(p_items, i_item, D) * scale
    b_sum = tl.zeros([STEP, triton.next_power_of_2(max(D, 16))], tl.float32)
    for first in range(start, end, STEP):
        i_entry = first + tl.arange(0, STEP)
        m_entry = i_entry < end
        order = tl.load(p_order + i_entry, mask=m_entry, other=0)
        i_token = order // slots
        m_target = order == i_token * slots
        b_h = _load_rows(p_hidden, i_token, m_entry, D).to(tl.float32)
        z = tl.sum(b_h * b_e[None, :], axis=1) + tl.where(m_target, 0.0, offset)
        slope = tl.exp(z - tl.load(p_log_sum + i_token)) - tl.where(m_target, 1.0, 0.0)
        m_live = m_entry & (m_target | (tl.load(p_targets + i_token) != i_item))
        slope = tl.where(m_live, slope * tl.load(p_grad + i_token), 0.0)
        b_sum += slope[:, None] * b_h
    i_column = _columns(D)
    b_d = tl.sum(b_sum, axis=0) * scale
    tl.store(p_partial + tl.cast(i_piece, tl.int64) * D + i_column, b_d, mask=i_column < D)


@triton.jit
def sum_rows_kernel(p_partial, p_order, p_starts, p_sums, D: tl.constexpr, STEP: tl.constexpr):
    """Adds to each item's row of sums its partial rows, which are [starts, next starts) of the order."""
    i_item = tl.program_id(0)
    start, end = tl.load(p_starts + i_item), tl.load(p_starts + i_item + 1)
    if start == end:
        return
    b_sum = tl.zeros([STEP, triton.next_power_of_2(max(D, 16))], tl.float32)
    for first in range(start, end, STEP):
        i_entry = first + tl.arange(0, STEP)
        m_entry = i_entry < end
        b_sum += _load_rows(p_partial, tl.load(p_order + i_entry, mask=m_entry, other=0), m_entry, D)
    i_column = _columns(D)
    p_store = p_sums + tl.cast(i_item, tl.int64) * D + i_column
    tl.store(p_store, tl.load(p_store, mask=i_column < D, other=0.0) + tl.sum(b_sum, axis=0), mask=i_column < D)


@triton.jit
def _block_of_tokens(token_blocks, group_size, num_tokens, BLOCK: tl.constexpr):
    """The group of a program, its tokens (BLOCK,) and whether each of them exists."""
    i_group = tl.program_id(0) // token_blocks
    i_local = (tl.program_id(0) % token_blocks) * BLOCK + tl.arange(0, BLOCK)
    i_token = i_group * group_size + i_local
    return i_group, i_token, (i_local < group_size) & (i_token < num_tokens)


@triton.jit
def _negatives(p_items, p_negatives, start, num_negatives, MASKED: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):
    """Whether each of STEP slots has a negative (all do unless MASKED), the items of the slots, and the rows of the items."""
    i_slot = start + tl.arange(0, STEP)
    m_slot = i_slot < num_negatives if MASKED else tl.full([STEP], True, tl.int1)
    i_row = tl.load(p_negatives + i_slot, mask=m_slot, other=0).to(tl.int32)
    return m_slot, i_row, _load_rows(p_items, i_row, m_slot, D)


@triton.jit
def _forward_tile(
    b_h, target, largest, total, p_items, p_negatives, p_bias, start, num_negatives, scale, offset,
    MASKED: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum after STEP more negatives. Logits, ``scale`` and ``offset`` are base-2 exponents."""
    m_slot, i_row, b_e = _negatives(p_items, p_negatives, start, num_negatives, MASKED, D, STEP)
    z = tl.dot(b_h, tl.trans(b_e), input_precision=PRECISION)
    if p_bias is not None:
        z = z * scale + _offsets(p_bias, i_row[None, :], m_slot[None, :], offset) * _LOG2_E
    # The logit of a negative that is the target, −5e4, would add nothing in float32, so −∞ replaces it.
    z = tl.where(i_row[None, :] != target[:, None], z, float("-inf"))
    if MASKED:
        z = tl.where(m_slot[None, :], z, float("-inf"))
    if p_bias is None:
        # With one offset for all, the largest product gives the largest logit, and each value takes one multiply-add.
        next_largest = tl.maximum(largest, tl.max(z, axis=1) * scale + offset)
        z = z * scale - (next_largest - offset)[:, None]
    else:
        next_largest = tl.maximum(largest, tl.max(z, axis=1))
        z -= next_largest[:, None]
    return next_largest, total * exp2(largest - next_largest) + tl.sum(exp2(z), axis=1)


@triton.jit(do_not_specialize=VARYING)
def forward_shared_kernel(
    p_hidden, p_items, p_targets, p_negatives, p_bias, p_loss, p_log_sum,
    num_tokens, num_negatives, group_size, token_blocks, scale, offset,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_group, i_token, m_token = _block_of_tokens(token_blocks, group_size, num_tokens, BLOCK)
    b_h = _load_rows(p_hidden, i_token, m_token, D)
    target = tl.load(p_targets + i_token, mask=m_token, other=0).to(tl.int32)
    b_target = _load_rows(p_items, target, m_token, D)
    scale *= _LOG2_E
    if p_bias is None:
        offset *= _LOG2_E
    z_target = tl.sum(b_h.to(tl.float32) * b_target.to(tl.float32), axis=1) * scale
    p_negatives += tl.cast(i_group, tl.int64) * num_negatives
    largest = z_target
    total = tl.full([BLOCK], 1.0, tl.float32)
    full = num_negatives // STEP * STEP
    for start in range(0, full, STEP):
        largest, total = _forward_tile(
            b_h, target, largest, total, p_items, p_negatives, p_bias, start, num_negatives, scale, offset,
            False, D, STEP, PRECISION,
        )  # fmt: skip
    if full < num_negatives:
        largest, total = _forward_tile(
            b_h, target, largest, total, p_items, p_negatives, p_bias, full, num_negatives, scale, offset,
            True, D, STEP, PRECISION,
        )  # fmt: skip
    log_total = tl.log(total)
    tl.store(p_loss + i_token, (largest - z_target) * _LN_2 + log_total, mask=m_token)
    tl.store(p_log_sum + i_token, largest * _LN_2 + log_total, mask=m_token)


@triton.jit
def _softmax_tile(b_first, b_second, i_row, i_target, scale, b_shift, PRECISION: tl.constexpr):
    """The softmax of a tile with rows and columns (tokens, negatives) or (negatives, tokens).

    ``b_shift`` is the token's log-sum minus the negative's offset. It and ``scale`` are base-2 exponents, so a value takes one
    multiply-add and one exponential.
    """
    z = tl.dot(b_first, tl.trans(b_second), input_precision=PRECISION) * scale - b_shift
    return tl.where(i_row != i_target, exp2(z), 0.0)


@triton.jit
def _backward_hidden_tile(
    b_d, b_h, target, log_sum, p_items, p_negatives, p_bias, start, num_negatives, scale, offset,
    MASKED: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m_slot, i_row, b_e = _negatives(p_items, p_negatives, start, num_negatives, MASKED, D, STEP)
    if p_bias is None:
        b_shift = (log_sum - offset)[:, None]
    else:
        b_shift = log_sum[:, None] - _offsets(p_bias, i_row[None, :], m_slot[None, :], offset) * _LOG2_E
    b_p = _softmax_tile(b_h, b_e, i_row[None, :], target[:, None], scale, b_shift, PRECISION)
    if MASKED:
        b_p = tl.where(m_slot[None, :], b_p, 0.0)
    return tl.dot(b_p.to(b_e.dtype), b_e, b_d, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def backward_hidden_shared_kernel(
    p_hidden, p_items, p_targets, p_negatives, p_bias, p_log_sum, p_grad, p_d_hidden,
    num_tokens, num_negatives, group_size, token_blocks, scale, offset,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_group, i_token, m_token = _block_of_tokens(token_blocks, group_size, num_tokens, BLOCK)
    b_h = _load_rows(p_hidden, i_token, m_token, D)
    target = tl.load(p_targets + i_token, mask=m_token, other=0).to(tl.int32)
    weight = tl.load(p_grad + i_token, mask=m_token, other=0.0) * scale
    log_sum = tl.load(p_log_sum + i_token, mask=m_token, other=0.0) * _LOG2_E
    scale *= _LOG2_E
    if p_bias is None:
        offset *= _LOG2_E
    p_negatives += tl.cast(i_group, tl.int64) * num_negatives
    # The target's part comes first, because after the loop its rows would spill.
    b_target = _load_rows(p_items, target, m_token, D).to(tl.float32)
    slope = exp2(tl.sum(b_h.to(tl.float32) * b_target, axis=1) * scale - log_sum) - 1.0
    b_d = slope[:, None] * b_target
    full = num_negatives // STEP * STEP
    for start in range(0, full, STEP):
        b_d = _backward_hidden_tile(
            b_d, b_h, target, log_sum, p_items, p_negatives, p_bias, start, num_negatives, scale, offset,
            False, D, STEP, PRECISION,
        )  # fmt: skip
    if full < num_negatives:
        b_d = _backward_hidden_tile(
            b_d, b_h, target, log_sum, p_items, p_negatives, p_bias, full, num_negatives, scale, offset,
            True, D, STEP, PRECISION,
        )  # fmt: skip
    _store_rows(p_d_hidden, b_d * weight[:, None], i_token, m_token, D)


@triton.jit(do_not_specialize=VARYING)
def backward_negatives_kernel(
    p_hidden, p_items, p_targets, p_negatives, p_bias, p_log_sum, p_grad, p_partial,
    num_tokens, num_negatives, group_size, first_group, splits, split_tokens, negative_blocks, scale, offset,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0) // negative_blocks  # among those of all groups: group · splits + split
    i_group = first_group + i_split // splits
    i_slot = (tl.program_id(0) % negative_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_slot = i_slot < num_negatives
    i_row = tl.load(p_negatives + tl.cast(i_group, tl.int64) * num_negatives + i_slot, mask=m_slot, other=0).to(
        tl.int32
    )
    b_e = _load_rows(p_items, i_row, m_slot, D)
    b_offset = _offsets(p_bias, i_row[:, None], m_slot[:, None], offset) * _LOG2_E
    start = (i_split % splits) * split_tokens
    end = tl.minimum(tl.minimum(start + split_tokens, group_size), num_tokens - i_group * group_size)
    b_d = tl.zeros([BLOCK, triton.next_power_of_2(max(D, 16))], tl.float32)
    for first in range(start, end, STEP):
        i_local = first + tl.arange(0, STEP)
        # Beyond the end, the last token is repeated with a gradient of 0, so that only the gradient needs a mask.
        i_token = i_group * group_size + tl.minimum(i_local, end - 1)
        target = tl.load(p_targets + i_token).to(tl.int32)
        log_sum = tl.load(p_log_sum + i_token) * _LOG2_E
        grad = tl.load(p_grad + i_token, mask=i_local < end, other=0.0)
        b_h = _load_rows(p_hidden, i_token, tl.full([STEP], True, tl.int1), D)
        b_shift = log_sum[None, :] - b_offset
        b_p = _softmax_tile(b_e, b_h, i_row[:, None], target[None, :], scale * _LOG2_E, b_shift, PRECISION)
        b_w = b_p * grad[None, :]
        b_d = tl.dot(b_w.to(b_h.dtype), b_h, b_d, input_precision=PRECISION)
    _store_rows(p_partial, b_d * scale, tl.cast(i_split, tl.int64) * num_negatives + i_slot, m_slot, D)
