"""Ranges of positions in arrays of events."""

from __future__ import annotations

import numpy as np

from mme.data.parts import IntArray


def concatenated(starts: IntArray, lengths: IntArray) -> IntArray:
    """The numbers ``starts[i]`` … ``starts[i] + lengths[i] - 1`` of each range i, range after range."""
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()))
