"""Groups users by popularity of the target and by length of the history, and averages a metric in each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NEW = "new"  # the target has no training event
# The upper bound of each group, as a share of the catalogue in the order of popularity.
POPULARITY_BOUNDS = {"top 1%": 0.01, "1–10%": 0.1, "10–50%": 0.5, "50–100%": 1.0}
# The least number of events in the history of each group.
HISTORY_BOUNDS = {"1–9": 1, "10–19": 10, "20–49": 20, "50–99": 50, "100 or more": 100}


def popularity_groups(target_places: Ints, target_events: Ints, num_items: int) -> dict[str, npt.NDArray[np.bool_]]:
    """Group → which users belong to it, (users,) bool.

    Args:
        target_places: (users,) place of each user's target in the order of popularity, 0 for the most popular item.
        target_events: (users,) training events of the target.
    """
    bounds = np.array([share * num_items for share in POPULARITY_BOUNDS.values()])
    group = np.where(target_events == 0, len(POPULARITY_BOUNDS), np.searchsorted(bounds, target_places, side="right"))
    group = np.minimum(group, len(POPULARITY_BOUNDS))
    return {name: group == index for index, name in enumerate([*POPULARITY_BOUNDS, NEW])}


def history_groups(history_events: Ints) -> dict[str, npt.NDArray[np.bool_]]:
    """Group → which users belong to it, (users,) bool; ``history_events``: (users,) events before the target."""
    group = np.searchsorted(list(HISTORY_BOUNDS.values()), np.maximum(history_events, 1), side="right") - 1
    return {name: group == index for index, name in enumerate(HISTORY_BOUNDS)}


def group_means(values: Floats, groups: Mapping[str, npt.NDArray[np.bool_]], metric: str) -> list[dict[str, Any]]:
    """One row for each group that has users: ``group``, ``users``, the mean of ``metric`` and its ``standard_error``."""
    return [
        {
            "group": name,
            "users": int(inside.sum()),
            metric: float(values[inside].mean()),
            "standard_error": standard_error(values[inside]),
        }
        for name, inside in groups.items()
        if inside.any()
    ]


def standard_error(values: Floats) -> float:
    """Standard error of the mean, s / √n, with the sample's standard deviation s; 0 for a single value."""
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else 0.0
