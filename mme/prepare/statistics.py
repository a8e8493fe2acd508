"""The statistics in dataset.json: lengths of histories and popularity of items."""

from __future__ import annotations

import numpy as np

from mme.data.parts import IntArray


class LengthHistogram:
    """Counts the users with each number of events. Memory grows with the longest history, not with the number of users."""

    def __init__(self) -> None:
        self._users = np.zeros(1, np.int64)

    def add(self, lengths: IntArray) -> None:
        """Adds users; ``lengths`` (users,) are their numbers of events."""
        users = np.bincount(lengths, minlength=self._users.size)
        users[: self._users.size] += self._users
        self._users = users

    def summary(self) -> dict[str, float]:
        """The min, median, mean, p90, p99 and max of the lengths."""
        return _summary(np.arange(self._users.size), self._users)


def popularity_summary(counts: IntArray) -> dict[str, float]:
    """``counts`` (items,): events of each item → min, median, mean, p90, p99, max, Gini coefficient and the share of
    the events that the most popular hundredth of the items (rounded up) has."""
    values, items = np.unique(counts, return_counts=True)
    ordered = np.sort(counts)
    total = max(int(ordered.sum()), 1)
    # Gini of sorted x_1 … x_n: (2 Σ i x_i) / (n Σ x_i) - (n + 1) / n
    rank = np.arange(1, ordered.size + 1, dtype=np.float64)
    gini = 2 * float(rank @ ordered) / (ordered.size * total) - (ordered.size + 1) / ordered.size
    top = -(-ordered.size // 100)
    return _summary(values, items) | {
        "gini": round(gini, 6),
        "top_1_percent_share": round(float(ordered[-top:].sum()) / total, 6),
    }


def _summary(values: IntArray, weights: IntArray) -> dict[str, float]:
    """Of ``weights[i]`` observations of ``values[i]``, values rising; a quantile is the smallest value that the share
    of the observations reaches."""
    reached = np.cumsum(weights)
    total = int(reached[-1])

    def quantile(share: float) -> int:
        return int(values[np.searchsorted(reached, max(int(np.ceil(share * total)), 1))])

    return {
        "min": quantile(0),
        "median": quantile(0.5),
        "mean": round(float(values @ weights) / max(total, 1), 4),
        "p90": quantile(0.9),
        "p99": quantile(0.99),
        "max": quantile(1),
    }
