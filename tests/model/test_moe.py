"""The mixture of experts compared with a loop over tokens, and its balance losses with their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mme.model.moe import MixtureOfExperts, load_balance_loss, router_z_loss

NUM_EXPERTS, TOP_K, DIM, HIDDEN = 5, 2, 6, 9


def mixture(renormalize: bool, views_seen: int = 1) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(NUM_EXPERTS, TOP_K, DIM, HIDDEN, renormalize, views_seen=views_seen).double()


def by_token(moe: MixtureOfExperts, z: torch.Tensor) -> torch.Tensor:
    num_tokens, rows = len(z) // moe.views_seen, []
    for place, row in enumerate(z):
        view, token = divmod(place, num_tokens)
        seen = torch.cat([z[other * num_tokens + token] for other in range(moe.views_seen)])
        logits = (moe.router.weight @ seen).view(moe.views_seen, NUM_EXPERTS)[view]
        probabilities = torch.softmax(logits.float(), dim=0)
        chosen = probabilities.argsort(descending=True)[:TOP_K]
        weights = probabilities[chosen]
        weights = weights / weights.sum() if moe.renormalize else weights
        w1, w3, w2 = moe.experts.w1[chosen], moe.experts.w3[chosen], moe.experts.w2[chosen]
        outputs = [(F.silu(row @ w1[i]) * (row @ w3[i])) @ w2[i] for i in range(TOP_K)]
        rows.append(sum(weight.double() * output for weight, output in zip(weights, outputs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(("renormalize", "views_seen"), [(True, 1), (False, 1), (True, 2)])
def test_equals_a_loop_over_tokens(renormalize: bool, views_seen: int) -> None:
    moe = mixture(renormalize, views_seen)
    z = torch.randn(2 * 7, DIM, dtype=torch.float64, requires_grad=True)
    inputs = [z, *moe.parameters()]
    expected = by_token(moe, z)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)

    y, routing = moe(z, num_views=2)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    for found, wanted in zip(torch.autograd.grad(y, inputs, upstream), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    chosen = routing.experts.view(2, -1)
    for view in range(2):
        assert routing.counts[view].tolist() == torch.bincount(chosen[view], minlength=NUM_EXPERTS).tolist()


@pytest.mark.parametrize("views_seen", [1, 3])
def test_no_rows(views_seen: int) -> None:
    y, routing = mixture(True, views_seen)(torch.empty(0, DIM, dtype=torch.float64), num_views=3)
    assert y.shape == (0, DIM)
    assert routing.counts.tolist() == [[0] * NUM_EXPERTS] * 3


def test_balance_losses_of_parts_add_up_to_those_of_the_whole() -> None:
    moe = mixture(True)
    z = torch.randn(10, DIM, dtype=torch.float64)
    rows = torch.tensor(10)
    whole = moe.route(z, 1)
    parts = [moe.route(z[:4], 1), moe.route(z[4:], 1)]
    counts = whole.counts[0]

    share = counts / counts.sum()
    expected = NUM_EXPERTS * (share * whole.probabilities.mean(0)).sum()
    assert load_balance_loss(whole, counts, rows).item() == pytest.approx(expected.item())
    assert sum(load_balance_loss(p, counts, rows) for p in parts).item() == pytest.approx(expected.item())
    squared = torch.logsumexp(whole.logits, 1).square().mean().item()
    assert sum(router_z_loss(p, rows) for p in parts).item() == pytest.approx(squared)


def test_even_routing_has_the_smallest_balance_loss() -> None:
    moe = mixture(True)
    with torch.no_grad():
        moe.router.weight.zero_()
    routing = moe.route(torch.randn(10, DIM, dtype=torch.float64), 1)
    even = torch.full((NUM_EXPERTS,), 4)
    assert load_balance_loss(routing, even, torch.tensor(10)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("capacity_factor", [0.4, 1.0, 100.0])
def test_capacity_keeps_first_choices_first(capacity_factor: float) -> None:
    moe = mixture(True)
    moe.capacity_factor = capacity_factor
    z = torch.randn(2 * 8, DIM, dtype=torch.float64, requires_grad=True)
    routing = moe.route(z, 2)
    room = dict.fromkeys(range(NUM_EXPERTS), math.ceil(capacity_factor * 16 * TOP_K / NUM_EXPERTS))
    expected = torch.zeros_like(z)
    dropped = torch.zeros(2, NUM_EXPERTS, dtype=torch.int64)
    for j in range(TOP_K):
        for row in range(16):
            expert = int(routing.experts[row, j])
            if room[expert] == 0:
                dropped[row // 8, expert] += 1
                continue
            room[expert] -= 1
            w1, w3, w2 = moe.experts.w1[expert], moe.experts.w3[expert], moe.experts.w2[expert]
            result = (F.silu(z[row] @ w1) * (z[row] @ w3)) @ w2
            expected = expected.index_add(0, torch.tensor([row]), (routing.weights[row, j] * result)[None])
    inputs = [z, *moe.parameters()]
    upstream = torch.randn_like(expected)
    y, found = moe(z, 2)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.dropped, dropped)
    assert (dropped.sum() > 0) == (capacity_factor < 100)
    gradients = torch.autograd.grad(expected, inputs, upstream)
    for gradient, wanted in zip(torch.autograd.grad(y, inputs, upstream), gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)
