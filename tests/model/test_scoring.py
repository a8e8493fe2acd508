"""Normalised vectors and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mme.model.scoring import EPS, VALUES_AT_ONCE, normalize_views


@pytest.mark.parametrize("score_norm", ["concat", "per_view", "none"])
@pytest.mark.parametrize("rows", [5, VALUES_AT_ONCE // 2 + 3], ids=["one part", "several parts"])
def test_vectors_and_gradients_equal_those_of_autograd(score_norm: str, rows: int) -> None:
    x = torch.randn(rows, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1] = 0.0, EPS / 100  # a view without length, and an item that is shorter than EPS
    x = x[:, :2]  # not contiguous
    direction = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def reference(x: torch.Tensor) -> torch.Tensor:
        if score_norm == "none":
            return x.flatten(-2)
        if score_norm == "concat":
            return F.normalize(x.flatten(-2), dim=-1, eps=EPS)
        return (F.normalize(x, dim=-1, eps=EPS) / 2**0.5).flatten(-2)

    results = []
    for function in (reference, lambda x: normalize_views(x, score_norm)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, direction)
        results.append((y.detach(), gradient))
    (y, gradient), (found_y, found_gradient) = results
    torch.testing.assert_close(found_y, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(normalize_views(x, score_norm), y, rtol=1e-12, atol=1e-12)
