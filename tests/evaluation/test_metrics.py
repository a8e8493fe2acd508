"""Metrics by hand, and the popularity baseline against a sort."""

from __future__ import annotations

import math

import pytest
import torch

from mme.evaluation.metrics import rank_metrics, standard_errors
from mme.model.baselines import popularity_ranks


def test_metrics_by_hand() -> None:
    metrics = rank_metrics(torch.tensor([1, 2, 10, 11, 60]))
    assert metrics["hr@10"] == pytest.approx(3 / 5)
    assert metrics["hr@50"] == pytest.approx(4 / 5)
    gains = [1, 1 / math.log2(3), 1 / math.log2(11), 1 / math.log2(12)]
    assert metrics["ndcg@10"] == pytest.approx(sum(gains[:3]) / 5)
    assert metrics["ndcg@50"] == pytest.approx(sum(gains) / 5)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11 + 1 / 60) / 5)


def test_popularity_ranks_unseen_items_by_count_then_index() -> None:
    counts = torch.tensor([5, 9, 0, 5, 7])  # by popularity: 1, 4, 0, 3, 2
    targets = torch.tensor([0, 3, 1, 2])
    seen = [[1, 1, 4], [], [4], [2, 1]]  # a target seen before is ranked all the same
    offsets = torch.tensor([0, *map(len, seen)]).cumsum(0)
    ranks = popularity_ranks(counts, targets, torch.tensor([i for items in seen for i in items]), offsets)
    assert ranks.tolist() == [1, 4, 1, 4]


def test_standard_errors_are_those_of_the_means() -> None:
    ranks = torch.tensor([1, 2, 10, 11, 60])
    errors = standard_errors(ranks)
    hits = [1, 1, 1, 0, 0]
    assert errors["hr@10"] == pytest.approx((sum((hit - 0.6) ** 2 for hit in hits) / 4) ** 0.5 / 5**0.5)
    assert set(errors) == set(rank_metrics(ranks))
    assert set(standard_errors(ranks[:1]).values()) == {0.0}
