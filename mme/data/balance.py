"""The cost of a sequence, and how sequences are distributed among the ranks so that their loads are even."""

from __future__ import annotations

import numpy as np

from mme.config import ModelConfig
from mme.data.parts import IntArray
from mme.flops import attention_pair, expert_row, projections


def attention_equals_rest_at(model: ModelConfig) -> int:
    """The length L, in tokens, at which attention costs as much as the rest of a block.

    The costs are those of `mme.flops` with L keys per query.
    """
    chosen = model.moe.top_k if model.moe.num_experts else 1
    return max(1, round((projections(model) + chosen * expert_row(model)) / attention_pair(model)))


def sequence_cost(lengths: IntArray, equal_at: int) -> IntArray:
    """The cost of sequences of these lengths, in arbitrary units: L · (L + ``equal_at``)."""
    return lengths * (lengths + equal_at)


def deal(costs: IntArray, world_size: int) -> IntArray:
    """The rank of each sequence: in descending order of cost, each goes to the rank with the lowest load so far.

    Ties go to the lowest rank. If there are at least as many sequences as ranks, every rank gets one.
    """
    ranks = np.zeros(costs.size, dtype=np.int64)
    if world_size == 1:
        return ranks
    order = np.argsort(-costs, kind="stable")
    loads = np.zeros(world_size, dtype=np.int64)
    place = 0
    while place < order.size:
        # Assign many at once, because hundreds of ranks have thousands of sequences: the j-th next one goes to the rank
        # with the j-th lowest load, until a rank that has just received a sequence would have the lowest load again.
        lightest = loads.argsort(kind="stable")[: order.size - place]
        sequences = order[place : place + lightest.size]
        before, after = loads[lightest], loads[lightest] + costs[sequences]
        overtaken = before[1:] >= np.minimum.accumulate(after)[:-1]
        number = 1 + int(overtaken.argmax()) if overtaken.any() else lightest.size
        ranks[sequences[:number]] = lightest[:number]
        loads[lightest[:number]] = after[:number]
        place += number
    return ranks
