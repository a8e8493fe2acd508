"""What a sequence costs, and sequences dealt over the ranks so that none waits long for another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mme.config import ModelConfig
from mme.flops import attention_pair, expert_row, projections

IntArray = NDArray[np.int64]


def attention_equals_rest_at(model: ModelConfig) -> int:
    """The length L, in tokens, at which attention costs a sequence as much as everything else in a block: the counts of
    `mme.flops`, with as many keys for each query as the sequence is long.
    """
    chosen = model.moe.top_k if model.moe.num_experts else 1
    return max(1, round((projections(model) + chosen * expert_row(model)) / attention_pair(model)))


def sequence_cost(lengths: IntArray, equal_at: int) -> IntArray:
    """What sequences of these lengths cost, in a unit of its own: L · (L + ``equal_at``)."""
    return lengths * (lengths + equal_at)


def deal(costs: IntArray, world_size: int) -> IntArray:
    """The rank of each sequence: from the costliest down, each goes to the rank that has least so far.

    No rank is left without a sequence where there are as many as ranks; of equal ranks the first is chosen.
    """
    ranks = np.zeros(costs.size, dtype=np.int64)
    if world_size == 1:
        return ranks
    order = np.argsort(-costs, kind="stable")
    loads = np.zeros(world_size, dtype=np.int64)
    place = 0
    while place < order.size:
        # Many at once, for with hundreds of ranks each has thousands to deal: the j-th next goes to the rank with the
        # j-th smallest load, up to the first where one that has just been given a sequence has no more.
        lightest = loads.argsort(kind="stable")[: order.size - place]
        sequences = order[place : place + lightest.size]
        before, after = loads[lightest], loads[lightest] + costs[sequences]
        overtaken = before[1:] >= np.minimum.accumulate(after)[:-1]
        number = 1 + int(overtaken.argmax()) if overtaken.any() else lightest.size
        ranks[sequences[:number]] = lightest[:number]
        loads[lightest[:number]] = after[:number]
        place += number
    return ranks


def straggler_share(costs: IntArray, ranks: IntArray, world_size: int) -> float:
    """The share of the costliest rank's time that the ranks wait for it on average: (max − mean) / max."""
    load = np.bincount(ranks, weights=costs, minlength=world_size)
    return float(1 - load.mean() / load.max())
