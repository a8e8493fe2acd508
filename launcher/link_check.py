"""Who can reach whom, and how fast: the links between nodes, two at a time.

Reachability is tried by plain TCP before a process group is formed, since a group with a dead link is never formed and says
little. The rates are measured in the group, by the transport that training uses.
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
from launcher.torchrun import local_address

ANSWERS_WITHIN_S = 20.0  # a node's TCP connection
NODES_COME_WITHIN_S = 120.0  # after the rendezvous, which they have all passed
REPEATS = 5
PAIR_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
SLOWEST_GB_PER_S = {
    "cuda": 2.0,
    "cpu": 0.02,
}  # below them NCCL goes through ordinary sockets, or a link runs at 100 Mbit/s
OUTLIER = 4.0  # times slower than the fastest pair; a slow node among three makes most pairs slow

OPEN_PORTS = "all TCP ports must be open between the nodes, both ways: see firewall, security group and routes"
CHOOSE_INTERFACE = (
    "NCCL_DEBUG=INFO shows which link is used; NCCL_SOCKET_IFNAME, NCCL_IB_HCA and GLOO_SOCKET_IFNAME choose it; test the "
    "cable and the port of the node that is named"
)


@dataclass(frozen=True)
class Pair:
    """What two ranks measured between them: one way of a small message, and of a large one."""

    first: int
    second: int
    latency_s: float
    gb_per_s: float


def board() -> dist.Store:
    """What the processes tell each other before they form a group: the store that the group will use, too.

    Rank 0 serves it, where torchrun does not, as long as this lives.
    """
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    here = os.environ["RANK"] == "0" and not served_by_torchrun
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=NODES_COME_WITHIN_S)
    return dist.TCPStore(host, port, is_master=here, timeout=patience, wait_for_workers=False, multi_tenant=True)


def dead_links(store: dist.Store) -> Finding | None:
    """What the first process of each node finds when it connects to all the others; None where all answer."""
    nodes, node = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["GROUP_RANK"])
    if os.environ["LOCAL_RANK"] != "0":
        return None
    endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with listener(local_address(endpoint) or socket.gethostname()) as address:
        store.set(f"address/{node}", json.dumps((socket.gethostname(), *address)))
        others = {other: _told(store, f"address/{other}") for other in range(nodes) if other != node}
        here = f"{socket.gethostname()} ({address[0]})"
        store.set(f"dead/{node}", json.dumps(unreachable(here, others)))
        # All have tried before any listener closes.
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
    """A line for each of the other nodes (name, address, port; None: it did not come) that does not answer."""
    found = []
    for node, told in others.items():
        if told is None:
            found.append(f"node {node} did not tell its address within {NODES_COME_WITHIN_S:.0f} s")
            continue
        name, address, port = told
        try:
            socket.create_connection((address, port), ANSWERS_WITHIN_S).close()
        except OSError as error:
            found.append(f"{here} cannot reach {name} ({address}): {error.strerror or error}")
    return found


@contextmanager
def listener(host: str) -> Iterator[tuple[str, int]]:
    """A port of this node that accepts connections, without anyone looking at them."""
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
    """Rounds of disjoint pairs in which everyone meets everyone once: [0, 1, 2] → (1, 2); (0, 2); (0, 1)."""
    seats: list[int | None] = [*players] if len(players) % 2 == 0 else [None, *players]
    for _ in range(len(seats) - 1):
        halves = zip(seats, reversed(seats), strict=True)
        yield [(a, b) for (a, b), _ in zip(halves, range(len(seats) // 2), strict=False) if None not in (a, b)]  # type: ignore[misc]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure_pairs(rank: int, players: list[int], exchange: Callable[[int, int, int], None], device: str) -> list[Pair]:
    """The pairs in which ``rank`` is the first, each measured while the others of its round are.

    ``exchange(partner, num_bytes, times)`` sends so many bytes and receives as many, so often.
    """
    found = []
    for pairs in tournament(players):
        for first, second in pairs:
            if rank not in (first, second):
                continue
            partner = second if rank == first else first
            small, large = 8, PAIR_BYTES[device]
            exchange(partner, small, 1)  # the first one makes the connection
            latency_s = _seconds_of(lambda: exchange(partner, small, REPEATS)) / REPEATS / 2  # noqa: B023
            exchange(partner, large, 1)
            seconds = _seconds_of(lambda: exchange(partner, large, 1)) / 2  # noqa: B023
            if rank == first:
                found.append(Pair(first, second, latency_s, large / seconds / 1e9))
    return found


def there_and_back(rank: int, device: torch.device) -> Callable[[int, int, int], None]:
    """An `exchange` by the process group: the lower rank sends first."""

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
    """What the pairs of all ranks say; the slow one is named, or the rank that all the slow ones have in common."""
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
        found += f"; all {len(slow)} slow ones are those of {name(rank)}"
    elif len(slow) > 1:
        found += f"; {len(slow)} are slow"
    return Finding("links", "warning", found, CHOOSE_INTERFACE)


def _seconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
