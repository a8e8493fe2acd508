"""Metrics equal values computed by hand, and the popularity baseline equals a sort."""

from __future__ import annotations

import math

import pytest
import torch

from mme.distributed.world import World
from mme.evaluation.metrics import UNRANKED, rank_metrics, standard_errors
from mme.evaluation.popularity import Popularity, popularity_ranks
from mme.evaluation.record import METRICS, repeats_warning
from mme.evaluation.seen import is_repeated


def test_metrics_by_hand() -> None:
    metrics = rank_metrics(torch.tensor([1, 2, 10, 11, 60]))
    assert metrics["hr@10"] == pytest.approx(3 / 5)
    assert metrics["hr@50"] == pytest.approx(4 / 5)
    gains = [1, 1 / math.log2(3), 1 / math.log2(11), 1 / math.log2(12)]
    assert metrics["ndcg@10"] == pytest.approx(sum(gains[:3]) / 5)
    assert metrics["ndcg@50"] == pytest.approx(sum(gains) / 5)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11 + 1 / 60) / 5)


def test_a_target_in_no_list_counts_as_0_in_every_metric() -> None:
    metrics = rank_metrics(torch.tensor([2, UNRANKED]))
    assert metrics["hr@10"] == metrics["hr@50"] == 1 / 2
    assert metrics["ndcg@10"] == metrics["ndcg@50"] == pytest.approx(1 / math.log2(3) / 2)
    assert metrics["mrr"] == 1 / 4
    assert set(rank_metrics(torch.tensor([UNRANKED])).values()) == {0.0}


SEEN = [[1, 1, 4], [], [4], [2, 1]]
SEEN_IDS, SEEN_OFFSETS = torch.tensor([i for items in SEEN for i in items]), torch.tensor([0, 3, 3, 4, 6])


def test_popularity_ranks_unseen_items_by_count_then_index() -> None:
    counts = torch.tensor([5, 9, 0, 5, 7])  # by popularity: 1, 4, 0, 3, 2
    places = torch.tensor([2, 0, 4, 3, 1])
    assert torch.equal(Popularity.of(counts, 5, World.alone(counts.device)).of_items(torch.arange(5))[1], places)
    ranks = popularity_ranks(places[[0, 3, 1, 2]], places[SEEN_IDS], SEEN_OFFSETS)
    assert ranks.tolist() == [1, 4, 1, UNRANKED]  # the last target was seen


def test_repeated_targets_are_found_in_the_whole_history() -> None:
    assert is_repeated(torch.tensor([4, 4, 4, 4]), SEEN_IDS, SEEN_OFFSETS).tolist() == [True, False, True, False]
    assert is_repeated(torch.tensor([1, 0, 0, 2]), SEEN_IDS, SEEN_OFFSETS).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("seen", "share", "warns"), [("exclude", 0.0101, True), ("exclude", 0.01, False), ("include", 0.5, False)]
)
def test_a_warning_names_include_above_one_percent(seen: str, share: float, warns: bool) -> None:
    line = repeats_warning({"seen": seen, "repeated_targets": share, "split": "test"})
    assert (line is not None) == warns
    assert line is None or ("1.0% of the test targets" in line and "eval.seen=include" in line)


def test_standard_errors_are_those_of_the_means() -> None:
    ranks = torch.tensor([1, 2, 10, 11, 60])
    errors = standard_errors(ranks)
    hits = [1, 1, 1, 0, 0]
    assert errors["hr@10"] == pytest.approx((sum((hit - 0.6) ** 2 for hit in hits) / 4) ** 0.5 / 5**0.5)
    assert set(errors) == set(rank_metrics(ranks)) == set(METRICS)
    assert set(standard_errors(ranks[:1]).values()) == {0.0}
