"""Ranks and top-K from sharded tables equal those of a brute-force ranking, on any number of processes."""

from __future__ import annotations

from typing import Any

import torch

from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.evaluation.ranking import Ranker
from tests.distributed.processes import run_on
from tests.distributed.test_step import LENGTHS, NUM_ITEMS, configuration, sequences

SEEN = [[0, 1, 2], [5], [39, 7, 7, 3], [], [20, 21]]
TARGETS = [4, 5, 39, 0, 30]  # two of them seen before
SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]], 3: [[0, 1, 2, 3, 4], [], []]}


def rank(world: World, constant_tables: bool) -> tuple[Any, Any, Any]:
    """Ranks and top-6 by the sharded ranker; and, on one process, all scores."""
    recommender = Recommender(configuration(), NUM_ITEMS, world)
    if constant_tables:
        for shard in recommender.tables.weights():
            shard.tensor.fill_(1.0)
    mine = SPLITS[world.size][world.rank]
    batch = sequences(mine)
    seen = torch.tensor([item for b in mine for item in SEEN[b]], dtype=torch.int64)
    offsets = torch.tensor([0, *[len(SEEN[b]) for b in mine]]).cumsum(0)
    targets = torch.tensor([TARGETS[b] for b in mine], dtype=torch.int64)
    ranker = Ranker(recommender)
    ranks = ranker.target_ranks(batch, seen, offsets, targets)
    scores = recommender.encode(batch) @ recommender.catalogue()[1].T if world.size == 1 else None
    return ranks, ranker.top_k(batch, seen, offsets, 6), scores


def test_ranks_and_top_k_equal_brute_force() -> None:
    ((ranks, (items, values), scores),) = run_on(1, rank, False)
    for b in range(len(LENGTHS)):
        order = sorted(range(NUM_ITEMS), key=lambda item, b=b: (-scores[b, item].item(), item))
        ranked = [item for item in order if item not in SEEN[b] or item == TARGETS[b]]
        assert ranks[b] == 1 + ranked.index(TARGETS[b])
        unseen = [item for item in order if item not in SEEN[b]]
        assert items[b].tolist() == unseen[:6]
        torch.testing.assert_close(values[b], scores[b, unseen[:6]])

    for world_size in (2, 3):
        for sharded_ranks, (sharded_items, sharded_values), _ in run_on(world_size, rank, False):
            assert torch.equal(sharded_ranks, ranks)
            assert torch.equal(sharded_items, items)
            torch.testing.assert_close(sharded_values, values)


def test_equal_scores_rank_by_item_index() -> None:
    for ranks, (items, _), _ in run_on(2, rank, True):
        for b in range(len(LENGTHS)):
            unseen = [item for item in range(NUM_ITEMS) if item not in SEEN[b]]
            assert items[b].tolist() == unseen[:6]
            assert ranks[b] == 1 + len([item for item in unseen if item < TARGETS[b]])
