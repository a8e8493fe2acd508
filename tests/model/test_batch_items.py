"""Distinct rows of a batch and the positions of their uses."""

from __future__ import annotations

import pytest
import torch

from mme.model.batch_items import distinct_ids


@pytest.mark.parametrize("num_items", [10, 10**9])  # marks all items, sorts the ids
def test_distinct_ids_and_their_positions(num_items: int) -> None:
    ids, (first, second) = distinct_ids([torch.tensor([7, 3]), torch.tensor([[3, 9], [9, 9]])], num_items)
    assert ids.tolist() == [3, 7, 9]
    assert first.tolist() == [1, 0]
    assert second.tolist() == [[0, 2], [2, 2]]
