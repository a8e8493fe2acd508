"""The Triton form of sampled softmax: launch configurations, sorting for the items' gradient, custom operators, autograd.

Legend: T tokens, D width, U distinct items, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import contiguous, dot_precision, operator
from kernels.sampled_softmax import triton_kernels

# In smaller groups the negatives are gathered for each token. Tiles of 16 rows would be less than half full, and their partial
# rows in float32 would move more bytes than the sort that they save.
SMALLEST_SHARED_GROUP = 8
# What one pass of the items' gradient sorts or keeps, so that its memory does not grow with T.
ENTRIES_AT_ONCE = 1 << 22
PARTIAL_FLOATS_AT_ONCE = 1 << 24
PIECE = 256  # entries of an item that one program sums
PROGRAMS = 1024  # enough to fill a GPU


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched for one width, dtype and group size.

    Attributes:
        rows: gathered rows that a program of one token or one item takes at a time.
        tokens: tokens of a group that a program of the shared forward and d hidden kernels holds.
        negatives: negatives that such a program takes at a time.
        held_negatives: negatives that a program of the d negatives kernel holds.
        next_tokens: tokens that such a program takes at a time.
        precision: precision of `tl.dot`.
    """

    rows: int
    tokens: int
    negatives: int
    held_negatives: int
    next_tokens: int
    precision: str

    @classmethod
    def choose(cls, width: int, itemsize: int, precision: str, group_size: int) -> LaunchConfig:
        """Each choice compiles for sm_80 and sm_90 without spilled registers (`python -m kernels.aot`)."""
        columns = max(16, triton.next_power_of_2(width))
        # A tile of rows and its accumulators have 2048 floats each, which are 16 registers per thread of 4 warps.
        rows = min(64, 2048 // columns)
        # Tensor cores do not compute exact float32; its products hold both operands in registers.
        exact = itemsize == 4 and precision == "ieee"
        if columns <= 64:
            block, step = (32, 32) if exact else (64, 64 if itemsize == 2 else 32)
        elif columns <= 128:
            block, step = (32, 16) if exact else (64, 32)
        elif columns <= 256:
            block, step = (16, 16) if exact else (32, 32)
        else:
            block, step = 16, 16
        # In small groups the tile is no higher than the group, except that tl.dot needs 16 rows.
        most = max(16, triton.next_power_of_2(group_size))
        return cls(rows, min(block, most), step, block, min(step, most), precision)

    def own(self) -> dict[str, Any]:
        """The launch options of the kernels that gather rows."""
        return {"STEP": self.rows, "num_warps": 4, "num_stages": 1}

    def shared(self) -> dict[str, Any]:
        """The launch options of the shared forward and d hidden kernels."""
        return self._tiles(self.tokens, self.negatives)

    def shared_negatives(self) -> dict[str, Any]:
        """The launch options of the d negatives kernel."""
        return self._tiles(self.held_negatives, self.next_tokens)

    def _tiles(self, block: int, step: int) -> dict[str, Any]:
        return {"BLOCK": block, "STEP": step, "PRECISION": self.precision, "num_warps": 4, "num_stages": 2}


@operator("kernels::sampled_softmax_loss")
def loss_op(
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_bias: Tensor | None,
    group_size: int,
    temperature: float,
    logit_offset: float,
) -> tuple[Tensor, Tensor]:
    """The losses (T,) and, for backward, the log-sums (T,), both float32."""
    operands = (*contiguous(hidden, items, targets, negatives), _bias(item_bias))
    num_tokens, width = hidden.shape
    size, num_negatives = min(group_size or num_tokens, num_tokens), negatives.shape[1]
    config = LaunchConfig.choose(width, hidden.itemsize, dot_precision(hidden.dtype), size)
    loss, log_sum = (torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if not num_tokens:
        return loss, log_sum
    if size < SMALLEST_SHARED_GROUP:
        triton_kernels.forward_own_kernel[(num_tokens,)](
            *operands, loss, log_sum, num_negatives, size, 1 / temperature, logit_offset, D=width, **config.own()
        )
    else:
        token_blocks = triton.cdiv(size, config.tokens)
        triton_kernels.forward_shared_kernel[(negatives.shape[0] * token_blocks,)](
            *operands, loss, log_sum, num_tokens, num_negatives, size, token_blocks, 1 / temperature, logit_offset,
            D=width, **config.shared(),
        )  # fmt: skip
    return loss, log_sum


@loss_op.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss)


@operator("kernels::sampled_softmax_loss_backward")
def loss_backward_op(
    grad: Tensor,
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_bias: Tensor | None,
    log_sum: Tensor,
    group_size: int,
    temperature: float,
    logit_offset: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and items."""
    grad, hidden, items, targets, negatives = contiguous(grad, hidden, items, targets, negatives)
    num_tokens, width = hidden.shape
    size, num_negatives = min(group_size or num_tokens, num_tokens), negatives.shape[1]
    config = LaunchConfig.choose(width, hidden.itemsize, dot_precision(hidden.dtype), size)
    d_hidden = torch.empty_like(hidden)
    d_items = torch.zeros_like(items, dtype=torch.float32)
    if not num_tokens:
        return d_hidden, d_items.to(items.dtype)
    bias = _bias(item_bias)
    operands = (hidden, items, targets, negatives, bias, log_sum, grad)
    scales = (1 / temperature, logit_offset)
    if size < SMALLEST_SHARED_GROUP:
        triton_kernels.backward_hidden_own_kernel[(num_tokens,)](
            *operands, d_hidden, num_negatives, size, *scales, D=width, **config.own()
        )
        # Parts consist of whole groups and keep the alignment of the first row.
        step = max(1, ENTRIES_AT_ONCE // (num_negatives + 1) // (16 * size)) * 16 * size
        for start in range(0, num_tokens, step):
            part = slice(start, min(start + step, num_tokens))
            drawn = negatives[start // size : -(-part.stop // size)]
            if size > 1:
                drawn = drawn.repeat_interleave(size, 0)[: part.stop - start]
            rows = torch.cat([targets[part, None].int(), drawn.int()], 1)
            _add_entries(
                d_items, rows, hidden[part], items, targets[part], bias, log_sum[part], grad[part], scales, config
            )
    else:
        token_blocks = triton.cdiv(size, config.tokens)
        triton_kernels.backward_hidden_shared_kernel[(negatives.shape[0] * token_blocks,)](
            *operands, d_hidden, num_tokens, num_negatives, size, token_blocks, *scales,
            D=width, **config.shared(),
        )  # fmt: skip
        _add_entries(d_items, targets[:, None], hidden, items, targets, bias, log_sum, grad, scales, config)
        _add_shared_negatives(d_items, operands, size, scales, config)
    return d_hidden, d_items.to(items.dtype)


def _add_entries(
    d_items: Tensor,
    rows: Tensor,
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    log_sum: Tensor,
    grad: Tensor,
    scales: tuple[float, float],
    config: LaunchConfig,
) -> None:
    """Adds slope · hidden of each token and slot to the gradient of its item; ``rows`` (T, slots) are the items."""
    num_items, width = items.shape
    order, starts = _sort_by_item(rows, num_items)
    # The entries of an item are divided into pieces of PIECE; item i has the pieces [piece_starts[i], piece_starts[i + 1]).
    piece_starts = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + PIECE - 1) // PIECE, 0, dtype=torch.int32, out=piece_starts[1:])
    most_pieces = rows.numel() // PIECE + min(num_items, rows.numel())
    piece = torch.arange(most_pieces, dtype=torch.int32, device=rows.device)
    pieces = torch.searchsorted(piece_starts[1:], piece, right=True, out_int32=True)
    partial = torch.empty(most_pieces, width, dtype=torch.float32, device=rows.device)
    triton_kernels.backward_items_kernel[(most_pieces,)](
        hidden, items, targets, bias, log_sum, grad, partial, order, starts, pieces, piece_starts,
        num_items, rows.shape[1], *scales, D=width, PIECE=PIECE, **config.own(),
    )  # fmt: skip
    triton_kernels.sum_rows_kernel[(num_items,)](partial, piece, piece_starts, d_items, D=width, **config.own())


def _add_shared_negatives(
    d_items: Tensor, operands: tuple[Any, ...], size: int, scales: tuple[float, float], config: LaunchConfig
) -> None:
    """Adds the part of negatives that groups of ``size`` share: products of tiles give partial rows, which are sorted by item."""
    hidden, _, _, negatives, *_ = operands
    num_tokens, width = hidden.shape
    groups, num_negatives = negatives.shape
    if not num_negatives:
        return
    blocks = triton.cdiv(num_negatives, config.held_negatives)
    splits = min(triton.cdiv(size, config.next_tokens), triton.cdiv(PROGRAMS, groups * blocks))
    split_tokens = triton.cdiv(size, splits)
    at_once = max(1, PARTIAL_FLOATS_AT_ONCE // (splits * num_negatives * width))
    for first in range(0, groups, at_once):
        drawn = negatives[first : first + at_once]
        partial = torch.empty(len(drawn), splits, num_negatives, width, dtype=torch.float32, device=hidden.device)
        triton_kernels.backward_negatives_kernel[(len(drawn) * splits * blocks,)](
            *operands, partial, num_tokens, num_negatives, size, first, splits, split_tokens, blocks, *scales,
            D=width, **config.shared_negatives(),
        )  # fmt: skip
        order, starts = _sort_by_item(drawn, d_items.shape[0])
        rows = partial.sum(1) if splits > 1 else partial
        triton_kernels.sum_rows_kernel[(d_items.shape[0],)](rows, order, starts, d_items, D=width, **config.own())


def _sort_by_item(rows: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The positions in ``rows``, sorted by item, and ``starts``: item i has the range [starts[i], starts[i + 1]).

    Both are int32 and are computed without a transfer to the host.
    """
    # A radix sort takes one pass per byte of the key, so 16 bits halve the most expensive part of the items' gradient.
    dtype = torch.int16 if num_items < 1 << 15 else torch.int32
    keys, order = torch.sort(rows.flatten().to(dtype), stable=True)
    bounds = torch.arange(num_items + 1, dtype=dtype, device=rows.device)
    return order.int(), torch.searchsorted(keys, bounds, out_int32=True)


@loss_backward_op.register_fake
def _(grad: Tensor, hidden: Tensor, items: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    d_hidden, d_items = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, items))
    return d_hidden, d_items


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group_size, ctx.temperature, ctx.logit_offset = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = loss_backward_op(grad, *ctx.saved_tensors, ctx.group_size, ctx.temperature, ctx.logit_offset)
    return *gradients, None, None, None, None, None, None


loss_op.register_autograd(_backward, setup_context=_setup_context)


def _bias(item_bias: Tensor | None) -> Tensor | None:
    return None if item_bias is None else item_bias.contiguous()
