"""Collects the ranks and lists of each user during the test, and derives segments and a few examples from them.

Legend: B histories of one rank's batch, U histories of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mme.data.batch import EvaluationBatch
from mme.data.dataset import PreparedDataset
from mme.data.numbering import read_item_labels
from mme.evaluation.metrics import user_metrics
from mme.evaluation.popularity import Popularity
from mme.evaluation.ranking import Ranker
from mme.evaluation.seen import excluded_items
from mme.evaluation.segments import group_means, history_groups, popularity_groups
from mme.evaluation.user_ranks import LIST_LENGTH, UNRANKED, UserRanks

SEGMENTED = "ndcg@10"
NUM_EXAMPLES = 5
EXAMPLE_EVENTS = 5  # of a history and of a list


class CollectedUsers:
    """Collects results batch by batch on every rank; `add` is a collective."""

    def __init__(self, popularity: Popularity) -> None:
        self.popularity = popularity
        self._batches: list[dict[str, Tensor]] = []
        self._examples: list[dict[str, Any]] = []

    def add(self, batch: EvaluationBatch, ranker: Ranker, ranks: Tensor, popularity_ranks: Tensor) -> None:
        """Adds one batch of every rank; ``ranks`` and ``popularity_ranks`` are the (U,) ranks of the targets."""
        world = ranker.world
        facts = torch.stack([batch.sequences.user_rows, batch.targets, batch.seen_offsets.diff()], dim=1)
        user_row, target, history_events = torch.cat(world.gather(facts)).unbind(1)
        items, _ = ranker.top_k(batch.sequences, *excluded_items(batch, ranker.encoder.config.eval.seen), LIST_LENGTH)
        listed = items >= 0
        events, places = self.popularity.of_items(torch.cat([target, items.clamp(min=0).flatten()]))
        (target_events, listed_events), target_places = events.tensor_split([target.numel()]), places[: target.numel()]
        smoothed = (listed_events + 1) / (self.popularity.num_events + self.popularity.num_items)
        bits = -torch.log2(smoothed).view_as(items).where(listed, 0).sum(1)
        if not self._batches:
            self._examples = _examples(batch, ranks, items)
        self._batches.append(
            {
                "user_row": user_row,
                "rank": ranks,
                "popularity_rank": popularity_ranks,
                "target_place": target_places,
                "target_events": target_events,
                "history_events": history_events,
                "top_items": items,
                "novelty": bits.double() / listed.sum(1).clamp(min=1),
            }
        )

    def user_ranks(self, about: dict[str, Any]) -> UserRanks:
        """The ranks of all added users; ``about`` is the metadata."""
        arrays = {name: torch.cat([of[name] for of in self._batches]).cpu().numpy() for name in self._batches[0]}
        return UserRanks(about, **arrays)

    def examples(self, dataset: PreparedDataset) -> list[dict[str, Any]]:
        """Users of rank 0's first batch, from the best to the worst ranked target, named by their row; none without names."""
        names = item_names(dataset)
        if names is None:
            return []
        return [
            {
                "user": f"row {example['row']}",
                "history": names(example["history"]),
                "top": names(example["top"]),
                "target": names([example["target"]])[0],
                "rank": example["rank"],
            }
            for example in self._examples
        ]


def item_names(dataset: PreparedDataset) -> Callable[[list[int]], list[str]] | None:
    """A function that returns the titles of items, or the raw ids of items without a title.

    None if the data set's folder was removed after the job started, because only the folder has the ids.
    """
    if not dataset.folder.is_dir():
        return None
    labels = read_item_labels(dataset.folder)
    return lambda items: [labels[item].as_py() for item in items]


def segments(users: UserRanks) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Model and "popularity" → "popularity" and "history" → one row per group of users, see `mme.evaluation.segments`."""
    groups = {
        "popularity": popularity_groups(users.target_place, users.target_events, users.about["num_items"]),
        "history": history_groups(users.history_events),
    }
    found = {}
    for name, ranks in ((users.about["model"], users.rank), ("popularity", users.popularity_rank)):
        values = user_metrics(torch.from_numpy(ranks))[SEGMENTED].numpy()
        found[name] = {kind: group_means(values, of_kind, SEGMENTED) for kind, of_kind in groups.items()}
    return found


def _examples(batch: EvaluationBatch, ranks: Tensor, items: Tensor) -> list[dict[str, Any]]:
    """Chooses users of rank 0's batch, which comes first, spread as evenly as possible over the order of their ranks."""
    found = []
    offsets = batch.sequences.seq_offsets.tolist()
    order = torch.argsort(ranks[: batch.targets.numel()], stable=True).tolist()
    count = min(NUM_EXAMPLES, len(order))
    for place in (order[index * (len(order) - 1) // max(count - 1, 1)] for index in range(count)):
        start, end = offsets[place : place + 2]
        rank = int(ranks[place])
        found.append(
            {
                "row": int(batch.sequences.user_rows[place]),
                "history": batch.sequences.item_ids[max(start, end - EXAMPLE_EVENTS) : end].tolist(),
                "top": [item for item in items[place, :EXAMPLE_EVENTS].tolist() if item >= 0],
                "target": int(batch.targets[place]),
                "rank": None if rank == UNRANKED else rank,
            }
        )
    return found
