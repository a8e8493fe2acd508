"""Cuts the training events of users into the sequences that are trained on.

A user with n training events has n - 1 targets. The last token before a target is the preceding event.

    newest    one sequence per user: the newest min(n - 1, N) tokens; older targets are not trained on
    sliding   every target once: the newest N tokens, then windows that end S tokens earlier each time, until the oldest
              event is reached. With S < N a window begins with N - S tokens that are only context: their targets are
              trained in an older window, which gives them more history. The oldest window trains on all its tokens.

N = 4, S = 2, tokens t0 … t6 (7 targets):

    t3 t4 t5 t6      trained: t5 t6
    t1 t2 t3 t4      trained: t3 t4
    t0 t1 t2         trained: all three

Legend: N max_seq_len, S stride.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mme.data.parts import IntArray


class Sequences(NamedTuple):
    """B sequences; all attributes are (B,) int64.

    Attributes:
        rows: user rows.
        starts: position of the first token in the flat events.
        lengths: numbers of tokens.
        context: how many tokens at the beginning are only context.
    """

    rows: IntArray
    starts: IntArray
    lengths: IntArray
    context: IntArray


class Windows:
    """Numbers the sequences of a training set: user by user, newest first within a user."""

    def __init__(self, begins: IntArray, ends: IntArray, max_seq_len: int, stride: int | None) -> None:
        """
        Args:
            begins: (users,) position of each user's first training event in the flat events. ends: of the last one, exclusive.
            stride: S, from 1 to ``max_seq_len``; None: only the newest window.
        """
        self.begins, self.max_seq_len, self.stride = begins, max_seq_len, stride
        self.num_tokens = np.maximum(ends - begins - 1, 0)
        count = (self.num_tokens > 0).astype(np.int64)
        if stride is not None:
            count += -(-np.maximum(self.num_tokens - max_seq_len, 0) // stride)
        self._first = np.cumsum(count) - count  # (users,) number of each one's first sequence
        self._rows = np.repeat(np.arange(count.size, dtype=np.int32), count)  # (sequences,)

    def __len__(self) -> int:
        return self._rows.size

    def take(self, numbers: IntArray) -> Sequences:
        """The sequences with these numbers."""
        rows = self._rows[numbers].astype(np.int64)
        ends = self.num_tokens[rows]
        if self.stride is not None:
            ends -= self.stride * (numbers - self._first[rows])  # the difference counts the user's newer windows
        lengths = np.minimum(ends, self.max_seq_len)
        begins = ends - lengths
        context = np.zeros_like(lengths)
        if self.stride is not None:
            context[begins > 0] = self.max_seq_len - self.stride
        return Sequences(rows, self.begins[rows] + begins, lengths, context)
