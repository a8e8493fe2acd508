"""Processes on one machine listen only on the loopback interface; all of them learn of a mistake that rank 0 finds."""

from __future__ import annotations

import ipaddress
from typing import Any

import psutil
import torch

from mme.distributed.world import World
from mme.errors import UserError
from tests.distributed.processes import run_on


def listening(world: World) -> Any:
    assert world.sum(torch.tensor(1)) == world.size
    connections = psutil.Process().net_connections("tcp")
    return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]


def test_a_group_on_the_loopback_listens_only_there() -> None:
    addresses = [address for of_rank in run_on(2, listening) for address in of_rank]
    assert len(addresses) >= 3  # the store, and gloo in each process
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses)


def mistakes_of_first(world: World) -> list[str]:
    def act(what: str) -> None:
        seen.append(what)
        if what == "a mistake":
            raise UserError(what)

    seen: list[str] = []
    for what in ("nothing wrong", "a mistake"):
        try:
            world.on_first(lambda what=what: act(what))  # type: ignore[misc]
        except UserError as error:
            seen.append(f"raised {error}")
    return seen


def test_all_ranks_end_with_a_mistake_that_the_first_one_finds() -> None:
    first, second = run_on(2, mistakes_of_first)
    assert first == ["nothing wrong", "a mistake", "raised a mistake"]
    assert second == ["raised a mistake"]
