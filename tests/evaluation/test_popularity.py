"""The order of popularity, which the processes share, is that of a sort of the whole catalogue."""

from __future__ import annotations

import pytest
import torch

from mme.distributed.spread import SpreadValues, share_of
from mme.distributed.world import World
from mme.evaluation.popularity import Popularity
from tests.distributed.processes import run_on

COUNTS = torch.tensor([3, 0, 7, 3, 3, 0, 9, 7, 3, 1])  # equal ones within and across the shares


def looked_up(world: World, num_items: int) -> tuple[int, list[int], list[int], list[int]]:
    mine = share_of(num_items, world)
    popularity = Popularity.of(COUNTS[mine.start : mine.stop], num_items, world)
    ids = torch.arange(num_items).repeat(2)[world.rank :]  # others on each rank, some of them twice
    counts, places = popularity.of_items(ids if world.rank != 1 else ids.flip(0))
    return popularity.num_events, ids.tolist(), counts.tolist(), places.tolist()


@pytest.mark.parametrize(("processes", "num_items"), [(1, 10), (2, 10), (3, 4)])  # the third of (3, 4) keeps no item
def test_every_process_finds_counts_and_places_of_any_item(processes: int, num_items: int) -> None:
    order = sorted(range(num_items), key=lambda item: (-COUNTS[item], item))
    place = {item: number for number, item in enumerate(order)}
    for rank, (events, ids, counts, places) in enumerate(run_on(processes, looked_up, num_items)):
        ids = ids if rank != 1 else ids[::-1]
        assert events == COUNTS[:num_items].sum()
        assert counts == COUNTS[ids].tolist()
        assert places == [place[item] for item in ids]


def shares(world: World) -> int:
    return Popularity.of(COUNTS[share_of(10, world).start : share_of(10, world).stop], 10, world).facts.values.shape[0]


def test_a_process_keeps_only_its_share() -> None:
    assert run_on(3, shares) == [4, 4, 2]


def rows_of_nothing(world: World) -> tuple[int, ...]:
    mine = share_of(10, world)
    values = SpreadValues(world, 10, torch.arange(20).view(10, 2)[mine.start : mine.stop])
    return tuple(values.of(torch.arange(0 if world.rank else 3)).shape)


def test_a_process_may_ask_for_nothing() -> None:
    assert run_on(2, rows_of_nothing) == [(3, 2), (0, 2)]
