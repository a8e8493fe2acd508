"""Costs depend on the model's widths, and balancing limits stragglers on skewed lengths."""

from __future__ import annotations

import heapq

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data_loading import straggler_share
from mme.config import ModelConfig, MoEConfig
from mme.data.balance import attention_equals_rest_at, deal, sequence_cost

RANKS = 8


def test_cost_depends_on_the_models_widths() -> None:
    narrow = attention_equals_rest_at(ModelConfig(embedding_dim=64, num_tables=1))
    assert narrow == 528
    assert attention_equals_rest_at(ModelConfig(embedding_dim=128, num_tables=1)) == 2 * narrow
    dense = ModelConfig(embedding_dim=64, num_tables=1, moe=MoEConfig(num_experts=0))
    assert attention_equals_rest_at(dense) < narrow
    assert sequence_cost(np.array([0, 1, 10]), 5).tolist() == [0, 6, 150]


def test_stragglers_share_is_below_5_percent_on_skewed_lengths() -> None:
    lengths = np.minimum(np.random.default_rng(0).zipf(1.3, 20 * RANKS * 32), 1024).astype(np.int64)
    before, after = [], []
    for chosen in np.split(lengths, 20):
        costs = sequence_cost(chosen, 528)
        before.append(straggler_share(costs, np.arange(costs.size) % RANKS, RANKS))
        after.append(straggler_share(costs, deal(costs, RANKS), RANKS))
    assert np.mean(before) > 0.2
    assert np.mean(after) < 0.05


def test_a_giant_sequence_has_its_own_rank_and_no_rank_is_empty() -> None:
    ranks = deal(sequence_cost(np.array([4000] + [100] * 255), 528), 4)
    assert np.bincount(ranks).tolist() == [1, 85, 85, 85]
    assert deal(np.zeros(5, dtype=np.int64) + 1, 5).tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12) | st.integers(1, 10**6), max_size=60), st.integers(1, 9))
def test_dealing_many_at_once_equals_dealing_one_by_one(costs: list[int], world_size: int) -> None:
    heap = [(0, rank) for rank in range(world_size)]
    expected = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, rank = heap[0]
        expected[place] = rank
        heapq.heapreplace(heap, (load + costs[place], rank))
    assert deal(np.array(costs, dtype=np.int64), world_size).tolist() == expected
