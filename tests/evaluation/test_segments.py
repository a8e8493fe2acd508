"""Groups of users by popularity of the target and by length of the history."""

from __future__ import annotations

import numpy as np
import pytest

from mme.evaluation.segments import group_means, history_groups, popularity_groups, standard_error


def names_of(groups: dict[str, np.ndarray]) -> list[str]:
    """The group of each user; fails if a user is in none or in several."""
    assert (sum(inside.astype(int) for inside in groups.values()) == 1).all()
    return [
        next(name for name, inside in groups.items() if inside[user]) for user in range(len(groups[next(iter(groups))]))
    ]


def test_targets_are_grouped_by_their_place_in_the_catalogue() -> None:
    places = np.array([0, 1, 2, 19, 20, 99, 100, 199, 150])
    events = np.array([9, 8, 7, 6, 5, 4, 3, 1, 0])
    assert names_of(popularity_groups(places, events, num_items=200)) == [
        "top 1%", "top 1%", "1–10%", "1–10%", "10–50%", "10–50%", "50–100%", "50–100%", "new",
    ]  # fmt: skip


def test_histories_are_grouped_by_length() -> None:
    events = np.array([0, 1, 9, 10, 19, 20, 49, 50, 99, 100, 10_000])
    assert names_of(history_groups(events)) == [
        "1–9", "1–9", "1–9", "10–19", "10–19", "20–49", "20–49", "50–99", "50–99", "100 or more", "100 or more",
    ]  # fmt: skip


def test_means_and_standard_errors_by_group() -> None:
    values = np.array([0.0, 1.0, 0.5, 0.25])
    groups = {
        "a": np.array([True, True, True, False]),
        "b": ~np.ones(4, bool),
        "c": np.array([False, False, False, True]),
    }
    first, second = group_means(values, groups, "ndcg@10")
    assert (first["group"], first["users"], first["ndcg@10"]) == ("a", 3, 0.5)
    assert first["standard_error"] == pytest.approx(0.5 / 3**0.5)
    assert second == {"group": "c", "users": 1, "ndcg@10": 0.25, "standard_error": 0.0}


def test_standard_error_is_that_of_the_mean() -> None:
    generator = np.random.default_rng(0)
    means = [generator.normal(size=400).mean() for _ in range(2000)]
    assert standard_error(generator.normal(size=400)) == pytest.approx(np.std(means), rel=0.15)
