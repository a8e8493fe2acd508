"""The reported insight into a model equals that computed from whole tables and all routing decisions, on any split."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mme.data.batch import EvaluationBatch, SequenceBatch
from mme.distributed.recommender import Recommender
from mme.distributed.spread import share_of
from mme.distributed.world import World
from mme.evaluation.insight import insight
from mme.evaluation.metrics import rank_metrics
from mme.evaluation.popularity import Popularity
from mme.model.batch_items import distinct_ids
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration, sequences

SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]]}
COUNTS = torch.arange(NUM_ITEMS, 0, -1)  # item 0 is the most popular


def popularity(world: World) -> Popularity:
    mine = share_of(NUM_ITEMS, world)
    return Popularity.of(COUNTS[mine.start : mine.stop], NUM_ITEMS, world)


def learned(world: World) -> tuple[dict[str, Any], Any]:
    recommender = Recommender(configuration(), NUM_ITEMS, world)
    with torch.no_grad():
        for shard in recommender.tables.weights():
            if shard.name == "item_1":  # the second table: small, and of rank 1 but for a little
                shard.tensor.mul_(1e-2)
                shard.tensor[:, 1:] *= 1e-3
    batch = sequences(SPLITS[world.size][world.rank])
    evaluated = EvaluationBatch(batch, targets(batch), torch.zeros(0, dtype=torch.int64), 0 * batch.seq_offsets)
    found = insight(recommender, popularity(world), [evaluated])
    if world.size > 1:
        return found, None
    with torch.no_grad():
        rows = recommender.tables.lookup(torch.arange(NUM_ITEMS))
        ids, (index,) = distinct_ids([batch.item_ids], NUM_ITEMS)
        output = recommender.decoder(rows[ids], index, batch.seq_offsets, batch.timestamps)
        last = output.hidden[batch.seq_offsets[1:] - 1]
    ranks = torch.stack([alone(last, rows, targets(batch), view) for view in range(rows.shape[1])])
    return found, (rows, batch.item_ids, [routing.experts for routing in output.routing], ranks)


def targets(batch: SequenceBatch) -> Tensor:
    return batch.item_ids[batch.seq_offsets[:-1]]  # each history's first item


def alone(states: Tensor, rows: Tensor, wanted: Tensor, view: int) -> Tensor:
    """(B,) ranks of the wanted items among all items by the part of the score that one view adds."""
    lengths = rows.flatten(1).norm(dim=1)  # of the whole vectors: `score_norm: concat`
    scores = states[:, view] @ rows[:, view].T / lengths
    return 1 + (scores > scores.gather(1, wanted[:, None])).sum(1)


def test_figures_equal_those_of_the_whole() -> None:
    ((found, (rows, item_ids, experts, ranks)),) = run_on(1, learned)
    num_views = rows.shape[1]
    for view in range(num_views):
        values = torch.linalg.svdvals(rows[:, view].double())
        torch.testing.assert_close(torch.tensor(found["singular_values"][view]).double(), values, rtol=1e-3, atol=1e-6)
        share = values / values.sum()
        assert found["effective_rank"][view] == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-3)
    assert found["effective_rank"][1] < 1.1 < 2 < found["effective_rank"][0]

    centred = (rows - rows.mean(0)).double()
    kernels = [centred[:, view] @ centred[:, view].T for view in range(num_views)]
    for a in range(num_views):
        for b in range(num_views):
            cka = (kernels[a] * kernels[b]).sum() / (kernels[a].norm() * kernels[b].norm())
            assert found["similarity"][a][b] == pytest.approx(float(cka), rel=1e-4)

    batch = sequences(SPLITS[1][0])
    starts = (batch.seq_offsets + torch.arange(batch.seq_offsets.numel())).tolist()
    times = [batch.timestamps[start:end] for start, end in itertools.pairwise(starts)]
    assert found["longest_gap_s"] == max(int(of_history[-1] - of_history[0]) for of_history in times) > 0

    assert found["ranking"]["users"] == ranks.shape[1]
    by_view = [rank_metrics(of)["ndcg@10"] for of in ranks]
    assert found["ranking"]["ndcg@10"] == pytest.approx(by_view)
    assert by_view[0] != by_view[1]
    assert found["ranking"]["all_views"] == pytest.approx(by_view[0])  # the second table is next to nothing

    vectors = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    cosines = (vectors @ vectors.T).fill_diagonal_(-2)
    assert [(of["item"], of["events"]) for of in found["neighbours"]] == [(i, NUM_ITEMS - i) for i in range(8)]
    for item, of in enumerate(found["neighbours"]):
        values, others = cosines[item].topk(5)
        assert [other for other, _ in of["nearest"]] == others.tolist()
        assert [value for _, value in of["nearest"]] == pytest.approx(values.tolist(), abs=1e-3)

    routing = found["routing"]
    assert routing["blocks"] == list(range(len(experts)))
    for block, chosen in enumerate(experts):
        by_view = chosen.view(num_views, item_ids.numel(), -1)
        for view in range(num_views):
            wanted = [(by_view[view] == expert).double().mean().item() for expert in range(4)]
            assert routing["view"]["share"][block][view] == pytest.approx(wanted, rel=1e-4)
        for part in range(10):
            of_part = by_view[:, item_ids * 10 // NUM_ITEMS == part]
            if of_part.numel():
                wanted = [(of_part == expert).double().mean().item() for expert in range(4)]
                assert routing["popularity"]["share"][block][part] == pytest.approx(wanted, rel=1e-4)
    assert len(found["time_weights"][0]) == 129

    for sharded, _ in run_on(2, learned):
        assert sharded["routing"] == routing
        assert sharded["ranking"] == found["ranking"]
        assert sharded["neighbours"] == found["neighbours"]
        assert sharded["time_weights"] == found["time_weights"]
        for a, b in zip(sharded["singular_values"], found["singular_values"], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        for a, b in zip(sharded["similarity"], found["similarity"], strict=True):
            assert a == pytest.approx(b, rel=1e-6)


def without_histories(world: World) -> dict[str, Any]:
    return insight(Recommender(configuration(), NUM_ITEMS, world), popularity(world), [])


def test_without_histories_the_tables_alone_are_described() -> None:
    (found,) = run_on(1, without_histories)
    assert "ranking" not in found
    assert len(found["effective_rank"]) == 2
