"""How each user's history is divided into training events and held-out targets.

A history of n events, oldest first:

    leave_one_out   n ≥ 2: the last event is the test target; there is no validation
    leave_two_out   n ≥ 3: the last event is the test target, the one before it the validation target
    global_time     one cut-off time for all users, with a share `test_fraction` of all events at or after it. n_older is
                    the number of a user's events before the cut-off. The user's first event at or after the cut-off is the
                    test target (if n_older ≥ 1); the last event before it is the validation target (if n_older ≥ 2)

Everything before the first held-out event is training data. A history too short to have a target still loses its last
one or two events to `leave_one_out` and `leave_two_out`, as if it had one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mme.config import DataConfig
from mme.data.parts import IntArray

HeldOut = Literal["valid", "test"]
CountOlder = Callable[[float], IntArray]


@dataclass(frozen=True)
class Split:
    """A protocol and its parameter.

    Attributes:
        protocol: `data.protocol`.
        test_fraction: `data.global_time_test_fraction`; only global_time uses it.
    """

    protocol: str
    test_fraction: float = 0.1

    @classmethod
    def of(cls, data: DataConfig) -> Split:
        return cls(data.protocol, data.global_time_test_fraction)

    @property
    def held_out(self) -> tuple[HeldOut, ...]:
        """The parts that have targets."""
        return ("test",) if self.protocol == "leave_one_out" else ("valid", "test")

    @property
    def selection(self) -> HeldOut:
        """The part whose metrics choose the best checkpoint."""
        return self.held_out[0]

    def train_ends(self, user_offsets: IntArray, count_older: CountOlder) -> IntArray:
        """The end of each user's training events.

        Args:
            user_offsets: (users + 1,) int64, the events of user u are user_offsets[u] to user_offsets[u + 1].
            count_older: maps a test fraction to (users,) numbers of events before the cut-off.

        Returns:
            (users,) int64 exclusive end positions in the flat events.
        """
        begin, end = user_offsets[:-1], user_offsets[1:]
        if self.protocol == "global_time":
            num_older = count_older(self.test_fraction)
            return begin + num_older - (num_older >= 2)
        return np.maximum(begin, end - len(self.held_out))

    def targets(self, part: HeldOut, user_offsets: IntArray, count_older: CountOlder) -> tuple[IntArray, IntArray]:
        """The users that have a target in ``part``, and the target's position in the flat events; see `train_ends`."""
        begin, end = user_offsets[:-1], user_offsets[1:]
        if self.protocol == "global_time":
            num_older = count_older(self.test_fraction)
            has_target = num_older >= 2 if part == "valid" else (num_older >= 1) & (begin + num_older < end)
            position = begin + num_older - (part == "valid")
        else:
            # leave_two_out validates and tests the same users.
            has_target = end - begin > len(self.held_out)
            position = end - (2 if part == "valid" else 1)
        users = np.flatnonzero(has_target)
        return users, position[users]
