"""Checks the links between nodes, pair by pair: whether they connect, and how fast they are.

Connections are tested by plain TCP before a process group forms, because a dead link keeps the group from forming and
gives no useful message. Rates are measured within the group, over the transport that training uses.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.findings import Finding
from launcher.rendezvous import local_address
from mme.distributed.world import group_store

ANSWERS_WITHIN_S = 20.0  # timeout of a TCP connection
NODES_COME_WITHIN_S = 120.0  # timeout for another node's message, after all nodes have passed the rendezvous
REPEATS = 5
PAIR_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
# A slower link suggests that NCCL uses ordinary sockets, or that the network runs at 100 Mbit/s.
SLOWEST_GB_PER_S = {"cuda": 2.0, "cpu": 0.02}
OUTLIER = 4.0  # times slower than the fastest pair, not the median: one slow node of three makes most pairs slow

OPEN_PORTS = (
    "all TCP ports must be open between the nodes in both directions: check firewalls, security groups and routes"
)
CHOOSE_INTERFACE = (
    "NCCL_DEBUG=INFO shows which link is used; NCCL_SOCKET_IFNAME, NCCL_IB_HCA and GLOO_SOCKET_IFNAME choose it; test the "
    "cable and the port of the named node"
)


@dataclass(frozen=True)
class Pair:
    """The link between two ranks: one-way latency of a small message and rate of a large one."""

    first: int
    second: int
    latency_s: float
    gb_per_s: float


def board() -> dist.Store:
    """The store through which processes communicate before they form a group, and which the group then uses.

    Rank 0 serves it, for as long as the returned object lives, unless torchrun does.
    """
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    here = os.environ["RANK"] == "0" and not served_by_torchrun
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=NODES_COME_WITHIN_S)
    store = group_store(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), patience)
    if store is not None:
        return store
    return dist.TCPStore(host, port, is_master=here, timeout=patience, wait_for_workers=False, multi_tenant=True)


def dead_links(store: dist.Store) -> Finding | None:
    """Lets the first process of each node connect to all other nodes; None if all answer."""
    nodes, node = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["GROUP_RANK"])
    if os.environ["LOCAL_RANK"] != "0":
        return None
    endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with listener(local_address(endpoint) or socket.gethostname()) as address:
        store.set(f"address/{node}", json.dumps((socket.gethostname(), *address)))
        others = {other: _told(store, f"address/{other}") for other in range(nodes) if other != node}
        here = f"{socket.gethostname()} ({address[0]})"
        store.set(f"dead/{node}", json.dumps(unreachable(here, others)))
        # Wait until all nodes have tried before closing the listener.
        dead = [line for other in range(nodes) for line in _told(store, f"dead/{other}") or ()]
        store.set(f"read/{node}", "true")
        if node == 0:  # its process serves the store
            for other in range(nodes):
                _told(store, f"read/{other}")
    if not dead:
        return None
    more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
    return Finding("links", "failed", dead[0] + more, OPEN_PORTS)


def unreachable(here: str, others: dict[int, Any]) -> list[str]:
    """A line for each node that does not answer; ``others`` maps nodes to (name, address, port), or None if unknown."""
    found = []
    for node, told in others.items():
        if told is None:
            found.append(f"node {node} did not publish its address within {NODES_COME_WITHIN_S:.0f} s")
            continue
        name, address, port = told
        try:
            socket.create_connection((address, port), ANSWERS_WITHIN_S).close()
        except OSError as error:
            found.append(f"{here} cannot reach {name} ({address}): {error.strerror or error}")
    return found


@contextmanager
def listener(host: str) -> Iterator[tuple[str, int]]:
    """Opens a port on this node on which the kernel accepts connections; yields (address, port)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=1024) as server:
        yield server.getsockname()[:2]


def _told(store: Any, key: str) -> Any:
    try:
        store.wait([key], timedelta(seconds=NODES_COME_WITHIN_S))
        return json.loads(store.get(key))
    except dist.DistStoreError:
        return None


def tournament(players: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which every two players meet once: [0, 1, 2] → (1, 2); (0, 2); (0, 1)."""
    seats: list[int | None] = [*players] if len(players) % 2 == 0 else [None, *players]
    for _ in range(len(seats) - 1):
        halves = zip(seats, reversed(seats), strict=True)
        yield [(a, b) for (a, b), _ in zip(halves, range(len(seats) // 2), strict=False) if None not in (a, b)]  # type: ignore[misc]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure_pairs(rank: int, players: list[int], exchange: Callable[[int, int, int], None], device: str) -> list[Pair]:
    """Measures the links of ``rank`` and returns those in which it is first. Pairs of a round run at the same time.

    ``exchange(partner, num_bytes, times)`` sends and receives ``num_bytes``, ``times`` times.
    """
    found = []
    for pairs in tournament(players):
        for first, second in pairs:
            if rank not in (first, second):
                continue
            partner = second if rank == first else first
            small, large = 8, PAIR_BYTES[device]
            exchange(partner, small, 1)  # the first exchange opens the connection
            latency_s = _seconds_of(lambda: exchange(partner, small, REPEATS)) / REPEATS / 2  # noqa: B023
            exchange(partner, large, 1)
            seconds = _seconds_of(lambda: exchange(partner, large, 1)) / 2  # noqa: B023
            if rank == first:
                found.append(Pair(first, second, latency_s, large / seconds / 1e9))
    return found


def there_and_back(rank: int, device: torch.device) -> Callable[[int, int, int], None]:
    """An ``exchange`` for `measure_pairs` through the process group. The lower rank sends first."""

    def exchange(partner: int, num_bytes: int, times: int) -> None:
        data = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        for _ in range(times):
            for sender in sorted((rank, partner)):
                if sender == rank:
                    dist.send(data, partner)
                else:
                    dist.recv(data, partner)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return exchange


def judge(pairs: list[Pair], name: Callable[[int], str], device: str) -> Finding:
    """The finding for the pairs of all ranks. It names the slowest pair and a rank that all slow pairs share."""
    slowest = min(pairs, key=lambda pair: pair.gb_per_s)
    median = statistics.median(pair.gb_per_s for pair in pairs)
    latency_s = statistics.median(pair.latency_s for pair in pairs)
    found = (
        f"{len(pairs)} pair{'s' * (len(pairs) > 1)}: {median:.2f} GB/s, {1e6 * latency_s:.0f} µs (medians); slowest {slowest.gb_per_s:.2f} GB/s "
        f"between {name(slowest.first)} and {name(slowest.second)}"
    )
    limit = max(SLOWEST_GB_PER_S[device], max(pair.gb_per_s for pair in pairs) / OUTLIER)
    slow = [pair for pair in pairs if pair.gb_per_s < limit]
    if not slow:
        return Finding("links", "ok", found)
    common = set.intersection(*({pair.first, pair.second} for pair in slow))
    if len(slow) > 1 and len(common) == 1:
        (rank,) = common
        found += f"; all {len(slow)} slow pairs include {name(rank)}"
    elif len(slow) > 1:
        found += f"; {len(slow)} pairs are slow"
    return Finding("links", "warning", found, CHOOSE_INTERFACE)


def _seconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
