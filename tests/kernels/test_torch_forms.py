"""Values and gradients of expert FFN, gated RMS norm and sampled softmax equal those of their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import expert_ffn, gated_rms_norm, rms_norm, sampled_softmax_loss


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(form: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients of ``form`` equal those of ``definition`` in float64 and, up to rounding, in float32."""
    expected = definition(*inputs)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        cast = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        found = form(*cast)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        for value, wanted in zip(torch.autograd.grad(found, cast, upstream.to(found.dtype)), gradients, strict=True):
            wanted = torch.zeros_like(value, dtype=torch.float64) if wanted is None else wanted
            torch.testing.assert_close(value.double(), wanted, rtol=10 * tolerance, atol=10 * tolerance)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), dim=st.integers(1, 9), hidden=st.integers(1, 11))
def test_expert_ffn(counts: list[int], dim: int, hidden: int) -> None:
    num_experts, rows = len(counts), sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    expert = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(counts))

    def definition(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        gate = F.silu(torch.einsum("rd,rdf->rf", x, w1[expert])) * torch.einsum("rd,rdf->rf", x, w3[expert])
        return torch.einsum("rf,rfd->rd", gate, w2[expert])

    inputs = [leaf(rows, dim), leaf(num_experts, dim, hidden), leaf(num_experts, dim, hidden)]
    inputs.append(leaf(num_experts, hidden, dim))
    assert_same(lambda x, w1, w3, w2: expert_ffn(x, offsets, w1, w3, w2), definition, inputs)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 7), width=st.integers(1, 33))
def test_norms(rows: int, width: int) -> None:
    def norm(a: Tensor) -> Tensor:
        return a / torch.sqrt(a.square().mean(1, keepdim=True) + 1e-6)

    assert_same(rms_norm, norm, [leaf(rows, width)])
    assert_same(gated_rms_norm, lambda u, a: u * norm(a), [leaf(rows, width), leaf(rows, width)])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 20),
    items=st.integers(1, 9),
    negatives=st.integers(1, 7),
    group=st.sampled_from([0, 1, 3, 8]),
    biased=st.booleans(),
)
def test_sampled_softmax(tokens: int, items: int, negatives: int, group: int, biased: bool) -> None:
    size = group or max(1, tokens)
    groups = -(-tokens // size)
    drawn = torch.randint(items, (groups, negatives))
    targets = torch.randint(items, (tokens,))
    own = drawn[torch.arange(tokens) // size]
    bias = torch.randn(items) if biased else None

    def definition(hidden: Tensor, vectors: Tensor) -> Tensor:
        positive = (hidden * vectors[targets]).sum(1, keepdim=True) / 0.3
        negative = torch.einsum("td,tnd->tn", hidden, vectors[own]) / 0.3 + 0.5
        if bias is not None:
            negative = negative + bias.double()[own]
        negative = negative.masked_fill(own == targets[:, None], -5e4)
        return -torch.log_softmax(torch.cat([positive, negative], 1), 1)[:, 0]

    def form(hidden: Tensor, vectors: Tensor) -> Tensor:
        return sampled_softmax_loss(
            hidden, vectors, targets, drawn, group_size=group, temperature=0.3, logit_offset=0.5, item_bias=bias
        )

    assert_same(form, definition, [leaf(tokens, 4), leaf(items, 4)])


def test_wrong_arguments_are_named() -> None:
    x, offsets, w = torch.zeros(3, 4), torch.tensor([0, 3]), torch.zeros(1, 4, 5)
    with pytest.raises(ValueError, match=r"w2 has shape \(1, 4, 5\), expected \(1, 5, 4\)"):
        expert_ffn(x, offsets, w, w, w)
    with pytest.raises(ValueError, match="one shape"):
        gated_rms_norm(x, x[:2])
    with pytest.raises(ValueError, match=r"dropout_p \(1\.0\)"):
        rms_norm(x, dropout_p=1.0)
    with pytest.raises(ValueError, match=r"negatives has shape \(2, 5\), expected \(3, n\)"):
        sampled_softmax_loss(x, x, torch.zeros(3, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"item_bias has shape \(2,\) and dtype torch.float32, expected \(3,\)"):
        rows = torch.zeros(3, dtype=torch.int64)
        sampled_softmax_loss(x, x, rows, rows[:, None], item_bias=torch.zeros(2))
