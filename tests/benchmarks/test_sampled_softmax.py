"""The benchmark of sampled softmax rejects forms that compute something else."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.roofline import backends
from benchmarks.sampled_softmax import check_agreement, eager_loss, measure


@pytest.mark.parametrize("group", [1, 3, 0])
def test_measures_both_passes_of_each_form_once_they_agree(group: int) -> None:
    rows = measure(10, group, 4, 6, 5, torch.float32, torch.device("cpu"), seconds=0.0)
    found = [(row["form"], row["pass"]) for row in rows]
    forms = ("eager", *backends(torch.device("cpu")))
    assert found == [(form, direction) for form in forms for direction in ("forward", "backward")]
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["gflop"] == pytest.approx(2e-9 * 10 * 5 * 6)


def test_a_wrong_gradient_is_refused() -> None:
    hidden, items = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    targets, negatives = torch.tensor([0, 1, 2, 3]), torch.tensor([[1, 4]] * 4)
    eager = functools.partial(eager_loss, hidden, items, targets, negatives, 1)
    check_agreement("same", eager, eager, [hidden, items], 1e-6)
    detached = functools.partial(eager_loss, hidden, items.detach() + 0 * items, targets, negatives, 1)
    with pytest.raises(RuntimeError, match="d items of the detached form"):
        check_agreement("detached", detached, eager, [hidden, items], 1e-6)
