"""What a trained model has learned, in figures small enough for metrics.jsonl.

The tables stay sharded: each rank reads the rows of its share of the items in chunks and keeps only a D × D matrix of
products, from which the singular values of each table and the similarity of two views (linear CKA, Kornblith et al.,
arXiv 1905.00414) are computed. Routing is counted over a part of the test histories.

Legend: M views, d view width, D = M·d, E experts, R = M·T rows, N max_seq_len.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mme.data.batch import EvaluationBatch
from mme.distributed.recommender import Recommender
from mme.evaluation.metrics import rank_metrics
from mme.evaluation.neighbours import neighbours
from mme.evaluation.popularity import Popularity
from mme.evaluation.ranking import Ranker
from mme.evaluation.seen import excluded_items
from mme.model.inputs import positions_in_sequence

TABLE_ROWS = 16_384  # items of a rank per lookup
HISTORY_BATCHES = 16  # evaluation batches of each rank that are ranked by each view, and for which routing is counted
DECILES = 10


@torch.no_grad()
def insight(
    recommender: Recommender,
    popularity: Popularity,
    batches: Iterable[EvaluationBatch],
    before_batch: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """The spectra and similarity of the tables, the use of the experts and the learned curves, the same on every rank.

    Args:
        popularity: of the items in training.
        batches: histories of this rank; every rank has the same number of batches.
        before_batch: called before each collective part of the work.

    Returns:
        A dict with these keys:

        - ``singular_values`` [view][d] in descending order, ``effective_rank`` [view], ``similarity`` [view][view] in 0 … 1;
        - ``neighbours``, see `mme.evaluation.neighbours`;
        - ``ranking``, if there are several views and histories: NDCG@10 by the share of each view in the score, ``ndcg@10``
          [view], by all views together, ``all_views``, and the number of ``users``;
        - ``routing``, if there are experts: for "view", "popularity" and "position" the ``groups`` and the ``share`` of each
          group's choices, [block][group][expert]; and the ``blocks`` with experts;
        - ``longest_gap_s``, the longest time between two events of a history, including the target;
        - ``time_weights`` and ``position_weights`` [block][…].
    """
    products, sums = table_products(recommender, before_batch)
    found: dict[str, Any] = table_figures(products, sums, recommender.num_items, recommender.config.model.num_tables)
    some = list(itertools.islice(batches, HISTORY_BATCHES))
    found["longest_gap_s"] = _longest_gap_s(recommender, some)
    ranker = Ranker(recommender)
    found["neighbours"] = neighbours(ranker, popularity)
    if some and recommender.config.model.num_tables > 1:
        found["ranking"] = _ranking(ranker, some, before_batch)
    if recommender.decoder.moe_layers():
        found["routing"] = _routing(recommender, popularity, some, before_batch)
    return found | _curves(recommender)


def table_products(recommender: Recommender, before_batch: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """(D, D) float64 XᵀX of the whole catalogue's rows X, (num_items, D), and their sum (D,)."""
    world, model = recommender.world, recommender.config.model
    products = torch.zeros(model.embedding_dim, model.embedding_dim, dtype=torch.float64, device=world.device)
    sums = products.new_zeros(model.embedding_dim)
    share = -(-recommender.num_items // world.size)
    first = min(world.rank * share, recommender.num_items)
    last = min(first + share, recommender.num_items)
    for start in range(0, share, TABLE_ROWS):  # the same number on every rank, because a lookup is a collective
        before_batch()
        begin, end = min(first + start, last), min(first + start + TABLE_ROWS, last)
        rows = recommender.tables.lookup(torch.arange(begin, end, device=world.device)).flatten(1).double()
        products += rows.T @ rows
        sums += rows.sum(0)
    return world.sum(products), world.sum(sums)


def table_figures(products: Tensor, sums: Tensor, num_items: int, num_views: int) -> dict[str, Any]:
    """Singular values, effective rank exp(entropy of the singular values as shares) and CKA of every two views."""
    blocks = _by_view(products, num_views)
    values = [torch.linalg.eigvalsh(blocks[m][m]).clamp(min=0).sqrt().flip(0) for m in range(num_views)]
    shares = [value / value.sum().clamp(min=1e-30) for value in values]
    centred = _by_view(products - torch.outer(sums, sums) / num_items, num_views)
    norms = [centred[m][m].norm().clamp(min=1e-30) for m in range(num_views)]
    return {
        "singular_values": [_rounded(value) for value in values],
        "effective_rank": [float(torch.special.entr(share).sum().exp()) for share in shares],
        "similarity": [
            [float(centred[a][b].square().sum() / (norms[a] * norms[b])) for b in range(num_views)]
            for a in range(num_views)
        ],
    }


def _by_view(products: Tensor, num_views: int) -> list[list[Tensor]]:
    return [list(rows.chunk(num_views, 1)) for rows in products.chunk(num_views)]


def _ranking(ranker: Ranker, batches: list[EvaluationBatch], before_batch: Callable[[], Any]) -> dict[str, Any]:
    parts = []
    for batch in batches:
        before_batch()
        excluded = excluded_items(batch, ranker.encoder.config.eval.seen)
        parts.append(ranker.target_ranks_by_view(batch.sequences, *excluded, batch.targets))
    ranks = torch.cat(parts, dim=1)
    *by_view, of_all = [rank_metrics(of)["ndcg@10"] for of in ranks]
    return {"users": ranks.shape[1], "all_views": of_all, "ndcg@10": by_view}


def _longest_gap_s(recommender: Recommender, batches: list[EvaluationBatch]) -> int:
    """The longest time between the first event read and the target, over all ranks; 0 without histories."""
    longest = torch.zeros(1, dtype=torch.int64, device=recommender.world.device)
    for batch in batches:
        sequences = batch.sequences
        place = torch.arange(sequences.num_sequences + 1, device=sequences.seq_offsets.device)
        starts = sequences.seq_offsets + place  # a sequence of L tokens has L + 1 times
        gaps = sequences.timestamps[starts[1:] - 1] - sequences.timestamps[starts[:-1]]
        longest = torch.cat([longest, gaps.to(longest.device)]).max().unsqueeze(0)
    return int(torch.cat(recommender.world.gather(longest)).max())


def _routing(
    recommender: Recommender, popularity: Popularity, batches: list[EvaluationBatch], before_batch: Callable[[], Any]
) -> dict[str, Any]:
    config, device = recommender.config, recommender.world.device
    moe, num_views = config.model.moe, config.model.num_tables
    blocks = config.model.expert_blocks
    bounds = [2**power for power in range(config.data.max_seq_len.bit_length())]
    names = {
        "view": [f"view {view}" for view in range(num_views)],
        "popularity": [f"items {100 * part // DECILES}–{100 * (part + 1) // DECILES}%" for part in range(DECILES)],
        "position": [f"from {bound}" for bound in bounds],
    }
    totals = {
        name: torch.zeros(len(blocks), len(groups), moe.num_experts, dtype=torch.int64, device=device)
        for name, groups in names.items()
    }
    for batch in batches:
        before_batch()
        sequences = batch.sequences.to(device)
        output = recommender.decode(sequences)
        place = positions_in_sequence(sequences.seq_offsets, sequences.num_tokens) + 1
        decile = popularity.of_items(sequences.item_ids)[1] * DECILES // popularity.num_items
        groups = {
            "view": torch.arange(num_views, device=device).repeat_interleave(sequences.num_tokens),
            "popularity": decile.repeat(num_views),
            "position": (torch.bucketize(place, place.new_tensor(bounds), right=True) - 1).repeat(num_views),
        }
        for number, decided in enumerate(output.routing):
            experts = decided.experts.unflatten(0, (num_views, -1))
            if output.item_places is not None:
                experts = experts[:, output.item_places]
            for name, group in groups.items():
                cell = group[:, None] * moe.num_experts + experts.flatten(0, 1)
                table = totals[name][number]
                table += torch.bincount(cell.flatten(), minlength=table.numel()).view_as(table)
    shares = {}
    for name, table in totals.items():
        table = recommender.world.sum(table)
        shares[name] = {
            "groups": names[name],
            "share": [[_rounded(row) for row in block] for block in table / table.sum(-1, keepdim=True).clamp(min=1)],
        }
    return {"blocks": blocks, **shares}


def _curves(recommender: Recommender) -> dict[str, Any]:
    """time_weights [block][bucket] and position_weights [block][distance back] of the blocks that have them."""
    blocks: list[Any] = [block for block in recommender.decoder.blocks if hasattr(block, "ts_weights")]
    if not blocks:
        return {}
    max_seq_len = recommender.config.data.max_seq_len
    return {
        "time_weights": [_rounded(block.ts_weights) for block in blocks],
        "position_weights": [_rounded(block.pos_weights[:max_seq_len].flip(0)) for block in blocks],
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
