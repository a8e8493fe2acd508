"""The results that the test collects for each user are the same on any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mme.data.batch import EvaluationBatch, SequenceBatch
from mme.distributed.recommender import Recommender
from mme.distributed.spread import share_of
from mme.distributed.world import World
from mme.evaluation.collected import CollectedUsers, segments
from mme.evaluation.popularity import Popularity, popularity_ranks
from mme.evaluation.ranking import Ranker
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration, sequences

SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]]}
COUNTS = torch.arange(NUM_ITEMS, 0, -1) - 1  # item 0 is the most popular, the last one is new


def unseen_items(batch: SequenceBatch) -> torch.Tensor:
    """For each history, the first item that is not in it."""
    histories = batch.item_ids.split(batch.seq_offsets.diff().tolist())
    return torch.tensor([min(set(range(NUM_ITEMS)) - set(history.tolist())) for history in histories])


def collected(world: World) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    recommender = Recommender(configuration(), NUM_ITEMS, world)
    batch = sequences(SPLITS[world.size][world.rank])
    targets = unseen_items(batch)
    evaluated = EvaluationBatch(batch, targets, batch.item_ids, batch.seq_offsets)
    ranker = Ranker(recommender)
    mine = share_of(NUM_ITEMS, world)
    popularity = Popularity.of(COUNTS[mine.start : mine.stop], NUM_ITEMS, world)
    users = CollectedUsers(popularity)
    for _ in range(2):  # two batches of the same users
        ranks = ranker.target_ranks(batch, batch.item_ids, batch.seq_offsets, targets)
        places, seen = popularity.of_items(targets)[1], popularity.of_items(batch.item_ids)[1]
        popular = torch.cat(world.gather(popularity_ranks(places, seen, batch.seq_offsets)))
        users.add(evaluated, ranker, ranks, popular)
    found = users.user_ranks({"model": "fuxi-mme", "num_items": NUM_ITEMS})
    return {name: value for name, value in vars(found).items() if name != "about"}, segments(found), users._examples


def test_facts_of_each_user() -> None:
    ((found, by_model, examples),) = run_on(1, collected)
    batch = sequences(SPLITS[1][0])
    lengths = batch.seq_offsets.diff().numpy()
    targets = unseen_items(batch).numpy()
    assert found["user_row"].tolist() == [*batch.user_rows.tolist()] * 2
    np.testing.assert_array_equal(found["history_events"], np.tile(lengths, 2))
    np.testing.assert_array_equal(found["target_place"], np.tile(targets, 2))
    np.testing.assert_array_equal(found["target_events"], np.tile(COUNTS.numpy()[targets], 2))
    probability = (COUNTS.double() + 1) / (COUNTS.sum() + NUM_ITEMS)
    for row, history in enumerate(batch.item_ids.split(lengths.tolist())):
        listed = found["top_items"][row][found["top_items"][row] >= 0]
        assert len(set(listed)) == len(listed) > 0 and not set(listed) & set(history.tolist())
        assert found["novelty"][row] == pytest.approx(float(-probability[listed].log2().mean()), rel=1e-5)
    assert {name: sum(group["users"] for group in of["history"]) for name, of in by_model.items()} == {
        "fuxi-mme": 10,
        "popularity": 10,
    }
    order = np.argsort(found["rank"][:5], kind="stable")
    assert [example["rank"] for example in examples] == found["rank"][order].tolist()
    assert [example["target"] for example in examples] == targets[order].tolist()
    newest = {row: history[-5:].tolist() for row, history in enumerate(batch.item_ids.split(lengths.tolist()))}
    assert [example["history"] for example in examples] == [newest[row] for row in order]


def test_two_processes_collect_the_same() -> None:
    ((alone, by_model, examples),) = run_on(1, collected)
    order = np.argsort(alone["user_row"], kind="stable")
    ranks = run_on(2, collected)
    rank_0_examples = ranks[0][2]
    assert rank_0_examples == [example for example in examples if example["row"] in SPLITS[2][0]]
    for found, of_rank, _ in ranks:
        place = np.argsort(found["user_row"], kind="stable")
        for name, values in alone.items():
            np.testing.assert_allclose(found[name][place], values[order], rtol=1e-6)
        assert of_rank["fuxi-mme"]["history"] == by_model["fuxi-mme"]["history"]
