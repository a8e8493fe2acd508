"""Sampled softmax in PyTorch, for the CPU and for what the Triton form does not take.

With a group of one, logits are products of a row with rows of its own, and both gradients are weighted sums of rows
(`embedding_bag`); the sum into the items reads its entries sorted by item, so that it runs in a fixed order. In larger groups all are batched products.

Legend: T tokens, D width, U distinct items, n negatives; see `api.py` for the definition.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_LOGIT = -5e4
TOKENS_AT_ONCE = 32  # tokens whose negatives' rows exist at once; 32 · 128 rows of 50 floats stay in the cache


class OwnNegatives(torch.autograd.Function):
    """Every token has negatives of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        items: Tensor,
        targets: Tensor,
        negatives: Tensor,
        item_bias: Tensor | None,
        temperature: float,
        logit_offset: float,
    ) -> Tensor:
        # 32-bit rows halve the time of the sort and of the weighted sums.
        rows = torch.cat([targets[:, None], negatives], dim=1).int()
        logits = _products(hidden, items, rows)
        logits = _finish_logits(logits, targets, negatives, item_bias, temperature, logit_offset)
        log_sum = torch.logsumexp(logits, dim=1)
        loss = log_sum - logits[:, 0]
        ctx.save_for_backward(hidden, items, rows, _slopes(logits, log_sum))
        ctx.temperature = temperature
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, items, rows, slopes = ctx.saved_tensors
        num_tokens, width = rows.shape
        weights = (slopes * (grad / ctx.temperature)[:, None]).to(hidden.dtype).flatten()
        flat = rows.flatten()
        bags = torch.arange(0, num_tokens * width, width, dtype=torch.int32, device=rows.device)
        grad_hidden = F.embedding_bag(flat, items, bags, mode="sum", per_sample_weights=weights)
        # A stable sort goes digit by digit: half as many in 16 bits.
        order = torch.argsort(flat.short() if items.shape[0] <= 2**15 else flat, stable=True)
        token = torch.div(order.to(flat.dtype), width, rounding_mode="trunc")
        counts = torch.bincount(flat, minlength=items.shape[0])
        bags = (counts.cumsum(0) - counts).int()
        sorted_weights = weights.index_select(0, order)
        grad_items = F.embedding_bag(token, hidden, bags, mode="sum", per_sample_weights=sorted_weights)
        return grad_hidden, grad_items, None, None, None, None, None


class SharedNegatives(torch.autograd.Function):
    """Groups of consecutive tokens share their negatives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        items: Tensor,
        targets: Tensor,
        negatives: Tensor,
        item_bias: Tensor | None,
        group_size: int,
        temperature: float,
        logit_offset: float,
    ) -> Tensor:
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
        ctx.save_for_backward(hidden, items, targets, negatives, _slopes(logits, log_sum))
        ctx.group_size, ctx.temperature = group_size, temperature
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, items, targets, negatives, slopes = ctx.saved_tensors
        groups, num_negatives = negatives.shape
        weights = (slopes * (grad / ctx.temperature)[:, None]).to(hidden.dtype)
        grouped_weights = _grouped(weights[:, 1:], groups, ctx.group_size)
        vectors = items.index_select(0, negatives.flatten()).unflatten(0, (groups, num_negatives))
        grad_hidden = torch.bmm(grouped_weights, vectors).flatten(0, 1)[: hidden.shape[0]]
        grad_hidden = grad_hidden.addcmul(weights[:, :1], items.index_select(0, targets))
        grad_vectors = torch.bmm(grouped_weights.transpose(1, 2), _grouped(hidden, groups, ctx.group_size))
        grad_items = torch.zeros_like(items)
        grad_items.index_add_(0, negatives.flatten(), grad_vectors.flatten(0, 1))
        grad_items.index_add_(0, targets, weights[:, :1] * hidden)
        return grad_hidden, grad_items, None, None, None, None, None, None


def _products(hidden: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """⟨h_t, e_rows[t, j]⟩, (T, 1 + n), in float32 or wider on a CPU."""
    num_tokens, width = rows.shape
    if hidden.device.type == "cpu" and width <= items.shape[0]:
        # A sparse matrix that names the pairs: no row is copied, 2 to 2.6 times faster than below (D = 16 to 128). Its rows
        # may name an item twice, but PyTorch allots no more entries than a dense matrix would have.
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
    """d loss_t / d z_tj; takes the place of the logits."""
    slopes = logits.sub_(log_sum[:, None]).exp_()
    slopes[:, 0] -= 1
    return slopes


def _grouped(x: Tensor, groups: int, group_size: int) -> Tensor:
    """(T, w) → (groups, group_size, w), the last group filled up with zeros."""
    return F.pad(x, (0, 0, 0, groups * group_size - x.shape[0])).unflatten(0, (groups, group_size))
