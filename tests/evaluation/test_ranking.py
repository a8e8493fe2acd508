"""Ranks and top-K from sharded tables equal those of a brute-force ranking, on any number of processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.errors import JobError
from mme.evaluation.metrics import UNRANKED
from mme.evaluation.ranking import Ranker, _first_of_the_best
from mme.model.scoring import normalize_views
from tests.distributed.processes import run_on
from tests.distributed.test_step import FEATURE_SIZES, FEATURES, LENGTHS, NUM_ITEMS, configuration, sequences

SEEN = [[0, 1, 2], [5], [39, 7, 7, 3], [], [20, 21]]
TARGETS = [4, 5, 39, 0, 30]  # the second and third are seen before, and so in no list
SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]], 3: [[0, 1, 2, 3, 4], [], []]}


def rank(world: World, constant_tables: bool, *overrides: str) -> tuple[Any, Any, Any]:
    """Ranks and top-6 of the sharded ranker and, on one process, all scores."""
    config = configuration(*overrides)
    recommender = Recommender(config, NUM_ITEMS, world, FEATURE_SIZES | {"segment": 200})
    if constant_tables:
        for shard in recommender.tables.weights():
            shard.tensor.fill_(1.0)
    mine = SPLITS[world.size][world.rank]
    batch = sequences(mine, with_features=bool(config.model.event_features))
    seen = torch.tensor([item for b in mine for item in SEEN[b]], dtype=torch.int64)
    offsets = torch.tensor([0, *[len(SEEN[b]) for b in mine]]).cumsum(0)
    targets = torch.tensor([TARGETS[b] for b in mine], dtype=torch.int64)
    ranker = Ranker(recommender)
    ranks = ranker.target_ranks(batch, seen, offsets, targets)
    scores = None
    if world.size == 1:
        vectors = normalize_views(
            recommender.lookup(torch.arange(NUM_ITEMS)).detach(), recommender.config.model.score_norm
        )
        scores = recommender.encode(batch) @ vectors.T
    return ranks, ranker.top_k(batch, seen, offsets, 6), scores


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.score_norm=per_view", "parallel.table_sharding=row_wise"],  # scored where they are
        ["parallel.table_sharding=data_parallel", "model.score_norm=none"],  # likewise
        ["parallel.table_sharding=row_wise", *FEATURES],  # the last processes have no items, only feature rows
        ["parallel.table_sharding=table_wise", "train.table_optimizer=adam"],  # copied
    ],
    ids=" ".join,
)
def test_ranks_and_top_k_equal_brute_force(overrides: list[str]) -> None:
    ((ranks, (items, values), scores),) = run_on(1, rank, False, *overrides)
    for b in range(len(LENGTHS)):
        order = sorted(range(NUM_ITEMS), key=lambda item, b=b: (-scores[b, item].item(), item))
        unseen = [item for item in order if item not in SEEN[b]]
        assert ranks[b] == (UNRANKED if TARGETS[b] in SEEN[b] else 1 + unseen.index(TARGETS[b]))
        assert items[b].tolist() == unseen[:6]
        torch.testing.assert_close(values[b], scores[b, unseen[:6]])

    for world_size in (2, 3):
        for sharded_ranks, (sharded_items, sharded_values), _ in run_on(world_size, rank, False, *overrides):
            assert torch.equal(sharded_ranks, ranks)
            assert torch.equal(sharded_items, items)
            torch.testing.assert_close(sharded_values, values)


def test_equal_scores_rank_by_item_index() -> None:
    for ranks, (items, _), _ in run_on(2, rank, True):
        for b in range(len(LENGTHS)):
            unseen = [item for item in range(NUM_ITEMS) if item not in SEEN[b]]
            assert items[b].tolist() == unseen[:6]
            assert ranks[b] == (UNRANKED if TARGETS[b] in SEEN[b] else 1 + unseen.index(TARGETS[b]))


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_best_scores_are_those_of_the_first_equal_items(k: int) -> None:
    scores = torch.randint(0, 4, (200, 12), generator=torch.Generator().manual_seed(0)).float()
    scores[scores == 0] = -torch.inf  # items that are not ranked
    best, columns = _first_of_the_best(scores, k)
    for row in range(200):
        order = sorted(range(12), key=lambda column, row=row: (-scores[row, column].item(), column))[:k]
        assert best[row].tolist() == scores[row, order].tolist()
        ranked = [column for column in order if scores[row, column] > -torch.inf]
        assert sorted(columns[row, : len(ranked)].tolist()) == sorted(ranked)


@pytest.mark.parametrize(("width", "k"), [(300, 5), (5_000, 3), (5_003, 1), (20_011, 40)])
def test_the_first_of_equal_scores_are_found_in_wide_rows(width: int, k: int) -> None:
    generator = torch.Generator().manual_seed(width)
    distinct = torch.randn(1, width, generator=generator)
    tied = torch.randint(max(2, width // (2 * k)), (1, width), generator=generator).float()
    few = torch.full((1, width), -torch.inf)
    few[0, -(k // 2 + 1) :] = 0.5  # fewer than k items are ranked, in the partial block at the end
    scores = torch.cat([distinct, tied, torch.zeros(1, width), few])
    expected = torch.sort(scores, dim=1, descending=True, stable=True)
    best, columns = _first_of_the_best(scores, k)
    assert torch.equal(best, expected.values[:, :k])
    is_ranked = best > -torch.inf
    for row in range(4):
        found = columns[row, is_ranked[row]].tolist()
        assert sorted(found) == sorted(expected.indices[row, : len(found)].tolist())


def rank_with_spoiled_weights(world: World, where: str, value: float) -> tuple[str, str]:
    """The message and the type of the ranker's error at the first call, on this rank."""
    recommender = Recommender(configuration(), NUM_ITEMS, world)
    if where == "vectors":
        for shard in recommender.tables.weights():
            if shard.name == "item_1":
                row = 33 - shard.offsets[0]
                if 0 <= row < shard.tensor.shape[0]:
                    shard.tensor[row] = value
    else:
        with torch.no_grad():
            next(iter(recommender.decoder.blocks.parameters())).fill_(value)
    mine = SPLITS[world.size][world.rank]
    none = torch.zeros(0, dtype=torch.int64)
    try:
        ranker = Ranker(recommender)
        ranker.top_k(sequences(mine), none, torch.zeros(len(mine) + 1, dtype=torch.int64), 3)
    except JobError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])  # the last one is finite, its square is not
def test_vectors_that_are_not_finite_are_named_on_every_rank(world_size: int, value: float) -> None:
    for kind, message in run_on(world_size, rank_with_spoiled_weights, "vectors", value):
        assert kind == "NonFiniteError"
        assert message.startswith(
            "the item vectors are not finite for 1 of 40 items, the first that of item 33 in table item_1"
        )


@pytest.mark.parametrize("world_size", [1, 2])
def test_states_that_are_not_finite_are_named_on_every_rank(world_size: int) -> None:
    for kind, message in run_on(world_size, rank_with_spoiled_weights, "states", float("nan")):
        assert kind == "NonFiniteError"
        assert message.startswith("the decoder's state is not finite for 5 of 5 histories, the first that of row 0")
