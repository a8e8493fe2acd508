"""The splits of each protocol on three histories written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mme.config import DataConfig
from mme.data.split import Split

OFFSETS = np.array([0, 1, 3, 8])  # histories of 1, 2 and 5 events
OLDER = np.array([1, 0, 3])  # events before the cut-off


@pytest.mark.parametrize(
    ("protocol", "train_ends", "targets"),
    [
        ("leave_one_out", [0, 2, 7], {"test": ([1, 2], [2, 7])}),
        ("leave_two_out", [0, 1, 6], {"valid": ([2], [6]), "test": ([2], [7])}),
        ("global_time", [1, 1, 5], {"valid": ([2], [5]), "test": ([2], [6])}),
    ],
)
def test_cuts(protocol: str, train_ends: list[int], targets: dict[str, tuple[list[int], list[int]]]) -> None:
    fractions = []

    def count_older(fraction: float) -> np.ndarray:
        fractions.append(fraction)
        return OLDER

    split = Split(protocol, 0.3)
    assert split.train_ends(OFFSETS, count_older).tolist() == train_ends
    assert list(split.held_out) == list(targets)
    assert split.selection == ("test" if protocol == "leave_one_out" else "valid")
    for part in split.held_out:
        rows, positions = split.targets(part, OFFSETS, count_older)
        assert (rows.tolist(), positions.tolist()) == targets[part]
    assert set(fractions) == ({0.3} if protocol == "global_time" else set())


def test_split_of_a_configuration() -> None:
    data = DataConfig(protocol="global_time", global_time_test_fraction=0.25)
    assert Split.of(data) == Split("global_time", 0.25)
