"""Checks between all processes of a group. Preflight starts this module under torchrun with the argument OUTPUT_DIR.

The group forms as in training. The first process of each node prints the findings. Any process prints the error that
ends it.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from launcher.findings import Finding
from launcher.link_check import CHOOSE_INTERFACE, OPEN_PORTS, board, dead_links, judge, measure_pairs, there_and_back
from mme.distributed.world import World, process_group
from mme.errors import first_line
from mme.files import read_text, remove, write_text

REPEATS = 5
BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}  # sent by each process
SLOW_GPU_GB_PER_S = 2.0  # a lower rate suggests that NCCL uses ordinary sockets
CLOCK_TOLERANCE_S = 1.0
FOLDER_PATIENCE_S = 30.0  # network file systems show a new file to other nodes with a delay
ANSWERS_WITHIN_S = 120.0  # timeout of a collective
LAST_WORDS_S = 5.0  # between SIGTERM and the exit


class Place(NamedTuple):
    """Where a process runs: its node's number and name, and its rank there."""

    node: int
    host: str
    local_rank: int


@dataclass(frozen=True)
class Group:
    """The processes of the group, and the place of each rank."""

    world: World
    places: list[Place]

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.places[rank].host}"

    @property
    def spread(self) -> list[int]:
        """The first rank of each node; on a single node, all ranks."""
        nodes = [place.node for place in self.places]
        return [rank for rank, node in enumerate(nodes) if len(set(nodes)) == 1 or node not in nodes[:rank]]

    @property
    def peers(self) -> list[int]:
        """This rank and the ranks it measures links to: those with its local rank; on a single node, all ranks."""
        several = len(self.spread) < len(self.places)
        own = self.places[self.world.rank].local_rank
        return [rank for rank, place in enumerate(self.places) if not several or place.local_rank == own]


def main() -> None:
    _outlive_sigterm()
    output_dir = Path(sys.argv[1])
    checks: dict[str, Callable[[Group], Finding]] = {
        "group": _members,
        "all-reduce": _all_reduce,
        "all-to-all": _all_to_all,
        "links": _links,
        "clocks": clocks,
        "shared folder": lambda group: shared_folder(group, output_dir),
    }
    name = "links"
    try:
        store = board()
        dead = dead_links(store)
        if dead is not None:
            dead.print_line()
            raise SystemExit(1)
        name = "group"
        with process_group(ANSWERS_WITHIN_S, store) as world:
            group = group_of(world)
            for name, check in checks.items():  # noqa: B007  (the error handler uses the name)
                finding = check(group)
                if group.places[world.rank].local_rank == 0:
                    finding.print_line()
    except RuntimeError as error:  # from the process group: a process or a link has failed
        said = first_line(error)
        found = f"rank {os.environ.get('RANK', '0')} on {platform.node()}: {said}"
        Finding(name, "failed", found, f"a process or a link has failed: {OPEN_PORTS}").print_line()
        raise SystemExit(1) from error


def _outlive_sigterm() -> None:
    """Delays the exit after SIGTERM by a few seconds.

    torchrun sends SIGTERM as soon as another process dies, and this one may be about to report that failure. A thread
    handles the signal because the main thread may hang in a collective, where Python runs no signal handler.
    """
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)

    def end() -> None:
        while signal.SIGTERM not in woken.recv(1):
            pass
        time.sleep(LAST_WORDS_S)
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(wakes.detach())
    threading.Thread(target=end, daemon=True).start()


def group_of(world: World) -> Group:
    place = Place(int(os.environ.get("GROUP_RANK", "0")), platform.node(), int(os.environ.get("LOCAL_RANK", "0")))
    return Group(world, gather(world, place))


def _members(group: Group) -> Finding:
    """Checks that all processes run the same versions on the same kind of device."""
    versions = {name: version(name) for name in ("torch", "triton", "torchrec", "deepspeed")}
    versions["Python"] = platform.python_version()
    if group.world.device.type == "cuda":
        versions["GPU"] = torch.cuda.get_device_name(group.world.device)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    all_versions = gather(group.world, versions)
    nodes = sorted({place.host for place in group.places})
    different = sorted(
        {
            f"{name} {found[name]} on {group.places[rank].host}"
            for rank, found in enumerate(all_versions)
            for name in found
            if len({str(other.get(name)) for other in all_versions}) > 1
        }
    )
    found = f"{group.world.size} processes on {', '.join(nodes)}, {dist.get_backend()}"
    if different:
        advice = "run `make setup` on every node and exclude nodes with another kind of GPU: all nodes must be the same"
        return Finding("group", "failed", "; ".join(different), advice)
    return Finding("group", "ok", found)


def _all_reduce(group: Group) -> Finding:
    world = group.world
    values = torch.full((BYTES[world.device.type] // 4,), 1.0 + world.rank, device=world.device)
    expected = world.size * (world.size + 1) / 2
    work, one = values.clone(), torch.zeros(1, device=world.device)
    seconds = _median_time(world, lambda: work.copy_(values), lambda: dist.all_reduce(work))
    right = bool((work == expected).all())
    latency_s = _median_time(world, lambda: None, lambda: dist.all_reduce(one))
    # Each process sends and receives 2 (n - 1) / n of the bytes, so this rate does not depend on n.
    rate = 2 * (world.size - 1) / world.size * values.nbytes / seconds / 1e9
    return _rated("all-reduce", world, right, rate, seconds, latency_s, values.nbytes)


def _all_to_all(group: Group) -> Finding:
    world = group.world
    rows = BYTES[world.device.type] // 4 // world.size
    sent = torch.full((world.size, rows), float(world.rank), device=world.device)
    received, small = torch.empty_like(sent), torch.zeros(world.size, device=world.device)
    small_received = torch.empty_like(small)
    seconds = _median_time(world, lambda: received.zero_(), lambda: dist.all_to_all_single(received, sent))
    right = bool((received == torch.arange(world.size, device=world.device).float().unsqueeze(1)).all())
    latency_s = _median_time(world, lambda: None, lambda: dist.all_to_all_single(small_received, small))
    rate = (world.size - 1) / world.size * sent.nbytes / seconds / 1e9
    return _rated("all-to-all", world, right, rate, seconds, latency_s, sent.nbytes)


def _rated(
    name: str, world: World, right: bool, rate: float, seconds: float, latency_s: float, num_bytes: int
) -> Finding:
    found = (
        f"{rate:.2f} GB/s per process ({num_bytes / 2**20:.0f} MiB in {1e3 * seconds:.1f} ms), latency "
        f"{1e6 * latency_s:.0f} µs"
    )
    if not all(gather(world, right)):
        return Finding(
            name, "failed", "wrong values received", "NCCL_DEBUG=INFO shows the links; exclude one node after another"
        )
    if world.device.type == "cuda" and rate < SLOW_GPU_GB_PER_S and world.size > 1:
        return Finding(name, "warning", f"slow for GPUs: {found}", CHOOSE_INTERFACE)
    return Finding(name, "ok", found)


def _links(group: Group) -> Finding:
    world, kind = group.world, group.world.device.type
    if world.size == 1:
        return Finding("links", "ok", "one process")
    own = measure_pairs(world.rank, group.peers, there_and_back(world.rank, world.device), kind)
    return judge([pair for pairs in gather(world, own) for pair in pairs], group.name, kind)


def clocks(group: Group, clock: Callable[[], float] = time.time) -> Finding:
    """Compares each node's clock with the median of all. Rank 0 asks several times and uses the fastest answer.

    An offset within half the round trip plus `CLOCK_TOLERANCE_S` is accepted.
    """
    offsets = {0: (0.0, 0.0)}
    for rank in group.spread[1:]:
        if group.world.rank == 0:
            offsets[rank] = min((_ask(rank, clock) for _ in range(REPEATS)), key=lambda answer: answer[1])
        elif group.world.rank == rank:
            for _ in range(REPEATS):
                _answer(clock)
    offsets = gather(group.world, offsets)[0]
    median = statistics.median(offset for offset, _ in offsets.values())
    if len(offsets) == 2:
        median = 0.0  # with two clocks, nothing shows which is right: compare with rank 0's
    off = {
        rank: offset - median
        for rank, (offset, way_s) in offsets.items()
        if abs(offset - median) > way_s + CLOCK_TOLERANCE_S
    }
    widest = max(offset for offset, _ in offsets.values()) - min(offset for offset, _ in offsets.values())
    if not off:
        return Finding("clocks", "ok", f"differ by at most {1e3 * widest:.1f} ms")
    against = "rank 0's" if len(offsets) == 2 else "the others'"
    found = "; ".join(
        f"the clock of {group.name(rank)} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {against}"
        for rank, offset in off.items()
    )
    advice = "start the NTP service there (chrony or systemd-timesyncd): `timedatectl` shows its state"
    return Finding("clocks", "failed", found, advice)


def _ask(rank: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds by which the clock of ``rank`` is ahead, and half the round-trip time."""
    answer = torch.zeros(1, dtype=torch.float64)
    asked, started = clock(), time.perf_counter()
    dist.send(answer, rank)
    dist.recv(answer, rank)
    way_s = (time.perf_counter() - started) / 2
    return float(answer) - (asked + way_s), way_s


def _answer(clock: Callable[[], float]) -> None:
    dist.recv(torch.zeros(1, dtype=torch.float64), 0)
    dist.send(torch.tensor([clock()], dtype=torch.float64), 0)


def shared_folder(group: Group, output_dir: Path, patience_s: float = FOLDER_PATIENCE_S) -> Finding:
    """Checks that every process can read in the folder for runs what the first process of each node wrote there."""
    world = group.world
    token = gather(world, uuid.uuid4().hex)[0]
    names = [f".preflight-{token}-{rank}" for rank in range(world.size)]
    own = output_dir / names[world.rank]
    problem = ""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(own, f"{token} {world.rank}", output_dir)
    except OSError as error:
        problem = f"{group.name(world.rank)}: {own}: {error.strerror}"
    dist.barrier()
    deadline = time.monotonic() + patience_s
    unseen = set(group.spread) if not problem else set()
    while unseen:
        unseen = {rank for rank in unseen if _read(output_dir / names[rank]) != f"{token} {rank}"}
        if time.monotonic() > deadline:
            break
        time.sleep(0.05 if unseen else 0)
    if unseen:
        problem = f"{group.name(world.rank)} does not see in {output_dir.resolve()} what {group.name(min(unseen))} wrote there"
    problems = [text for text in gather(world, problem) if text]
    remove(own)
    if problems:
        advice = (
            "checkpoints need a folder that all nodes share and can write to (NFS, Lustre, …): give its path as "
            "--output-dir here and as output_dir in the configuration"
        )
        return Finding("shared folder", "failed", problems[0], advice)
    return Finding("shared folder", "ok", f"{output_dir.resolve()}: read by all {world.size} processes")


def _read(path: Path) -> str | None:
    try:
        return read_text(path, path.parent)
    except (OSError, UnicodeDecodeError):
        return None


def _median_time(world: World, prepare: Callable[[], Any], work: Callable[[], Any]) -> float:
    """Median seconds of ``work``, after one warm-up."""
    seconds = []
    for _ in range(REPEATS + 1):
        prepare()
        _wait_for_device(world)
        dist.barrier()
        started = time.perf_counter()
        work()
        _wait_for_device(world)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _wait_for_device(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def gather(world: World, value: Any) -> list[Any]:
    """The ``value`` of each rank."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main()
