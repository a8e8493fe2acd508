"""Sampled softmax in PyTorch, for CPUs and for inputs that the Triton form does not take.

With a group size of one, each token has its own negatives: logits are products of its row with their rows, and both gradients
are weighted sums of rows (`embedding_bag`). The sum into the items reads its entries sorted by item, so its order is fixed. In
larger groups, all of these are batched products.

Legend: T tokens, D width, U distinct items, n negatives; see `api.py` for the definition.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import operator

MASKED_LOGIT = -5e4
TOKENS_AT_ONCE = 32  # tokens whose negatives are gathered at a time; 32 · 128 rows of 50 floats stay in the cache


@operator("kernels::sampled_softmax_own_torch")
def own_negatives(
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_bias: Tensor | None,
    temperature: float,
    logit_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (T,) if each token has its own negatives; for backward, rows (T, 1 + n) int32 and their slopes."""
    # 32-bit rows halve the time of the sort and of the weighted sums.
    rows = torch.cat([targets[:, None], negatives], dim=1).int()
    logits = _products(hidden, items, rows)
    logits = _finish_logits(logits, targets, negatives, item_bias, temperature, logit_offset)
    log_sum = torch.logsumexp(logits, dim=1)
    loss = log_sum - logits[:, 0]
    return loss, rows, _slopes(logits, log_sum)


@own_negatives.register_fake
def _(hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, slopes = _empty_results(hidden, negatives)
    return loss, torch.empty_like(slopes, dtype=torch.int32), slopes


@operator("kernels::sampled_softmax_own_torch_backward")
def own_negatives_backward(
    grad: Tensor, hidden: Tensor, items: Tensor, rows: Tensor, slopes: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and items."""
    num_tokens, width = rows.shape
    weights = (slopes * (grad / temperature)[:, None]).to(hidden.dtype).flatten()
    flat = rows.flatten()
    bags = torch.arange(0, num_tokens * width, width, dtype=torch.int32, device=rows.device)
    grad_hidden = F.embedding_bag(flat, items, bags, mode="sum", per_sample_weights=weights)
    # A stable sort is a radix sort; 16-bit keys have half as many digits.
    order = torch.argsort(flat.short() if items.shape[0] <= 2**15 else flat, stable=True)
    token = torch.div(order.to(flat.dtype), width, rounding_mode="trunc")
    counts = torch.bincount(flat, minlength=items.shape[0])
    bags = (counts.cumsum(0) - counts).int()
    sorted_weights = weights.index_select(0, order)
    return grad_hidden, F.embedding_bag(token, hidden, bags, mode="sum", per_sample_weights=sorted_weights)


@operator("kernels::sampled_softmax_shared_torch")
def shared_negatives(
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_bias: Tensor | None,
    group_size: int,
    temperature: float,
    logit_offset: float,
) -> tuple[Tensor, Tensor]:
    """The losses (T,) if groups of consecutive tokens share their negatives; for backward, the slopes (T, 1 + n)."""
    num_tokens = hidden.shape[0]
    groups, num_negatives = negatives.shape
    grouped = _grouped(hidden, groups, group_size)
    vectors = items.index_select(0, negatives.flatten()).unflatten(0, (groups, num_negatives))
    logits = hidden.new_empty(groups * group_size, 1 + num_negatives)
    torch.bmm(grouped, vectors.transpose(1, 2), out=logits.unflatten(0, (groups, group_size))[:, :, 1:])
    logits = logits[:num_tokens]
    logits[:, 0] = (hidden * items.index_select(0, targets)).sum(-1)
    group = torch.arange(num_tokens, device=hidden.device) // group_size
    own = negatives.index_select(0, group)
    logits = _finish_logits(logits, targets, own, item_bias, temperature, logit_offset)
    log_sum = torch.logsumexp(logits, dim=1)
    loss = log_sum - logits[:, 0]
    return loss, _slopes(logits, log_sum)


@shared_negatives.register_fake
def _(hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(hidden, negatives)


@operator("kernels::sampled_softmax_shared_torch_backward")
def shared_negatives_backward(
    grad: Tensor,
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    slopes: Tensor,
    group_size: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and items."""
    groups, num_negatives = negatives.shape
    weights = (slopes * (grad / temperature)[:, None]).to(hidden.dtype)
    grouped_weights = _grouped(weights[:, 1:], groups, group_size)
    vectors = items.index_select(0, negatives.flatten()).unflatten(0, (groups, num_negatives))
    grad_hidden = torch.bmm(grouped_weights, vectors).flatten(0, 1)[: hidden.shape[0]]
    grad_hidden = grad_hidden.addcmul(weights[:, :1], items.index_select(0, targets))
    grad_vectors = torch.bmm(grouped_weights.transpose(1, 2), _grouped(hidden, groups, group_size))
    grad_items = items.new_zeros(items.shape)
    grad_items.index_add_(0, negatives.flatten(), grad_vectors.flatten(0, 1))
    grad_items.index_add_(0, targets, weights[:, :1] * hidden)
    return grad_hidden, grad_items


def _save_own(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, items, _, _, _, ctx.temperature, _ = inputs
    _, rows, slopes = output
    ctx.mark_non_differentiable(rows, slopes)
    ctx.save_for_backward(hidden, items, rows, slopes)


def _differentiate_own(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *own_negatives_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None, None, None


def _save_shared(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.group_size, ctx.temperature, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_shared(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = shared_negatives_backward(grad, *ctx.saved_tensors, ctx.group_size, ctx.temperature)
    return *gradients, None, None, None, None, None, None


def _empty_gradients(grad: Tensor, hidden: Tensor, items: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), items.new_empty(items.shape)


own_negatives_backward.register_fake(_empty_gradients)
shared_negatives_backward.register_fake(_empty_gradients)
own_negatives.register_autograd(_differentiate_own, setup_context=_save_own)
shared_negatives.register_autograd(_differentiate_shared, setup_context=_save_shared)


def _empty_results(hidden: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised losses and slopes, in float32 or, for float64 operands, in float64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shape = hidden.shape[0], 1 + negatives.shape[1]
    return hidden.new_empty(shape[0], dtype=wide), hidden.new_empty(shape, dtype=wide)


def _products(hidden: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """⟨h_t, e_rows[t, j]⟩, (T, 1 + n), in float32 or wider on a CPU."""
    num_tokens, width = rows.shape
    if hidden.device.type == "cpu" and width <= items.shape[0]:
        # A sparse matrix lists the pairs, so no row is copied: 2 to 2.6 times faster than the loop below (D = 16 to 128). A row
        # may list an item twice, but PyTorch allows no more entries than a dense matrix would have.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        starts, shape = torch.arange(0, rows.numel() + 1, width, dtype=rows.dtype), (num_tokens, items.shape[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pairs = torch.sparse_csr_tensor(
                starts, rows.flatten(), torch.zeros(rows.numel(), dtype=wide), shape, check_invariants=False
            )
        return torch.sparse.sampled_addmm(pairs, hidden.to(wide), items.to(wide).T, beta=0).values().view(rows.shape)
    logits = hidden.new_empty(num_tokens, 1, width)
    for start in range(0, num_tokens, TOKENS_AT_ONCE):
        part = rows[start : start + TOKENS_AT_ONCE]
        vectors = items.index_select(0, part.flatten()).view(*part.shape, -1)
        torch.bmm(
            hidden[start : start + TOKENS_AT_ONCE, None],
            vectors.transpose(1, 2),
            out=logits[start : start + TOKENS_AT_ONCE],
        )
    return logits.squeeze(1)


def _finish_logits(
    logits: Tensor, targets: Tensor, own: Tensor, item_bias: Tensor | None, temperature: float, logit_offset: float
) -> Tensor:
    """Products (T, 1 + n) → logits, in float32 or wider; ``own`` (T, n) are the negatives of each token."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logits.mul_(1 / temperature)
    if logit_offset:
        logits[:, 1:] += logit_offset
    if item_bias is not None:
        logits[:, 1:] += item_bias.index_select(0, own.flatten()).view(own.shape)
    logits[:, 1:].masked_fill_(own == targets[:, None], MASKED_LOGIT)
    return logits


def _slopes(logits: Tensor, log_sum: Tensor) -> Tensor:
    """d loss_t / d z_tj, in the memory of the logits."""
    slopes = logits.sub_(log_sum[:, None]).exp_()
    slopes[:, 0] -= 1
    return slopes


def _grouped(x: Tensor, groups: int, group_size: int) -> Tensor:
    """(T, w) → (groups, group_size, w), with the last group padded with zeros."""
    return F.pad(x, (0, 0, 0, groups * group_size - x.shape[0])).unflatten(0, (groups, group_size))
