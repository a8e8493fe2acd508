"""A small training set in several parts, with histories of many lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from mme.prepare.writer import DatasetWriter

NUM_ITEMS = 40
LENGTHS = [1, 2, 3, 4, 9, 25, 7, 60, 3, 12, 5, 30, 2, 6, 18]
Histories = list[tuple[list[int], list[int]]]  # items and times of each user


def make_histories() -> Histories:
    rng = np.random.default_rng(5)
    return [(rng.integers(NUM_ITEMS, size=n).tolist(), np.sort(rng.integers(1000, size=n)).tolist()) for n in LENGTHS]


def write_set(path: Path, histories: Histories) -> Path:
    """Writes the histories to the folder ``path``; user row u has the raw id u + 100, item i the raw id ``"i<i>"``."""
    with DatasetWriter(path, events_per_part=40) as writer:
        for user, (items, times) in enumerate(histories):
            writer.add(pa.array([user + 100]), np.array([0, len(items)]), np.array(items), np.array(times))
        counts = np.bincount([item for items, _ in histories for item in items], minlength=NUM_ITEMS)
        writer.finish({"name": "t", "sort_rule": "stable"}, pa.array([f"i{n}" for n in range(NUM_ITEMS)]), counts)
    assert len(list(path.glob("part-*.parquet"))) > 2
    return path
