"""The nearest neighbours of the most popular items: the items that the model takes for similar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mme.distributed.spread import share_of
from mme.evaluation.popularity import Popularity
from mme.evaluation.ranking import Ranker

POPULAR_ITEMS = 8
NEAREST_ITEMS = 5


def neighbours(ranker: Ranker, popularity: Popularity) -> list[dict[str, Any]]:
    """The most popular items in order, with those that are nearest to each, the same on every rank. A collective.

    Returns:
        A dict for each item: ``item``, its index; ``events``, those in training; ``nearest``, pairs (item, similarity) in
        descending order, see `Ranker.nearest`.
    """
    world = ranker.world
    mine = share_of(popularity.num_items, world)
    count = min(POPULAR_ITEMS, popularity.num_items)
    events, places = popularity.facts.values.unbind(1)
    local = (places < count).nonzero().flatten()
    popular = torch.zeros(count, 2, dtype=torch.int64, device=places.device)
    popular[places[local]] = torch.stack([local + mine.start, events[local]], dim=1)
    ids, events = world.sum(popular).unbind(1)
    items, similarities = ranker.nearest(ids, NEAREST_ITEMS)
    return [
        {
            "item": item,
            "events": of_item,
            "nearest": [
                (other, float(f"{value:.4g}")) for other, value in zip(others, values, strict=True) if other >= 0
            ],
        }
        for item, of_item, others, values in zip(
            ids.tolist(), events.tolist(), items.tolist(), similarities.tolist(), strict=True
        )
    ]


def named(found: list[dict[str, Any]], names: Callable[[list[int]], list[str]]) -> list[dict[str, Any]]:
    """`neighbours` as `mme.run.records.Neighbours`, with each item by name."""
    return [
        {
            "item": names([of["item"]])[0],
            "events": of["events"],
            "nearest": [
                {"item": name, "similarity": similarity}
                for name, (_, similarity) in zip(names([item for item, _ in of["nearest"]]), of["nearest"], strict=True)
            ],
        }
        for of in found
    ]
