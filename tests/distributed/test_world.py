"""Processes on one machine listen only on the loopback interface."""

from __future__ import annotations

import ipaddress
from typing import Any

import psutil
import torch

from mme.distributed.world import World
from tests.distributed.processes import run_on


def listening(world: World) -> Any:
    assert world.sum(torch.tensor(1)) == world.size
    connections = psutil.Process().net_connections("tcp")
    return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]


def test_a_group_on_the_loopback_listens_only_there() -> None:
    addresses = [address for of_rank in run_on(2, listening) for address in of_rank]
    assert len(addresses) >= 3  # the store, and gloo in each process
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses)
