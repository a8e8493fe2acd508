"""Checks between all processes of a group, started by preflight under torchrun: ``… OUTPUT_DIR``.

The group is formed as training forms it. Rank 0 of each node prints what was found.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.findings import Finding
from mme.distributed.groups import World, process_group

REPEATS = 5
BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}  # sent by each process
SLOW_GPU_GB_PER_S = 2.0  # below it NCCL goes through ordinary sockets
CLOCK_TOLERANCE_S = 1.0
FOLDER_PATIENCE_S = 30.0  # network file systems show a new file to other nodes with delay


def main() -> None:
    output_dir = Path(sys.argv[1])
    with process_group() as world:
        findings = [
            _members(world),
            _all_reduce(world),
            _all_to_all(world),
            _clocks(world),
            _shared_folder(world, output_dir),
        ]
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for finding in findings:
                finding.print_line()


def _members(world: World) -> Finding:
    """All processes run the same versions."""
    versions = {name: version(name) for name in ("torch", "triton", "torchrec", "deepspeed")}
    versions["Python"] = platform.python_version()
    all_versions = _gather(world, (platform.node(), versions))
    nodes = sorted({node for node, _ in all_versions})
    different = (
        sorted({f"{node}: {name} {found[name]}" for node, found in all_versions for name in found})
        if any(found != versions for _, found in all_versions)
        else []
    )
    found = f"{world.size} processes on {', '.join(nodes)}, {dist.get_backend()}"
    if different:
        return Finding("group", "failed", "; ".join(different), "run `make setup` on every node: versions must agree")
    return Finding("group", "ok", found)


def _all_reduce(world: World) -> Finding:
    values = torch.full((BYTES[world.device.type] // 4,), 1.0 + world.rank, device=world.device)
    expected = world.size * (world.size + 1) / 2
    work = values.clone()
    seconds = _median_time(world, lambda: work.copy_(values), lambda: dist.all_reduce(work))
    right = bool((work == expected).all())
    # Each process sends and receives 2 (n - 1) / n of the bytes: the rate of its link, whatever n.
    rate = 2 * (world.size - 1) / world.size * values.nbytes / seconds / 1e9
    return _rated("all-reduce", world, right, rate, seconds, values.nbytes)


def _all_to_all(world: World) -> Finding:
    rows = BYTES[world.device.type] // 4 // world.size
    sent = torch.full((world.size, rows), float(world.rank), device=world.device)
    received = torch.empty_like(sent)
    seconds = _median_time(world, lambda: received.zero_(), lambda: dist.all_to_all_single(received, sent))
    right = bool((received == torch.arange(world.size, device=world.device).float().unsqueeze(1)).all())
    rate = (world.size - 1) / world.size * sent.nbytes / seconds / 1e9
    return _rated("all-to-all", world, right, rate, seconds, sent.nbytes)


def _rated(name: str, world: World, right: bool, rate: float, seconds: float, num_bytes: int) -> Finding:
    found = f"{rate:.2f} GB/s a process ({num_bytes / 2**20:.0f} MiB in {1e3 * seconds:.1f} ms)"
    if not all(_gather(world, right)):
        return Finding(
            name, "failed", "wrong values received", "NCCL_DEBUG=INFO shows the links; take nodes out in turn"
        )
    if world.device.type == "cuda" and rate < SLOW_GPU_GB_PER_S and world.size > 1:
        advice = (
            "slow for GPUs: see with NCCL_DEBUG=INFO which link is used; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it"
        )
        return Finding(name, "warning", found, advice)
    return Finding(name, "ok", found)


def _clocks(world: World) -> Finding:
    """The clocks of the other processes against rank 0's, each by the quickest of several questions and answers."""
    largest, farthest = 0.0, 0
    for rank in range(1, world.size):
        if world.rank == 0:
            exchanges = []
            for _ in range(REPEATS):
                answer = torch.zeros(1, dtype=torch.float64)
                asked = time.time()
                dist.send(answer, rank)
                dist.recv(answer, rank)
                answered = time.time()
                exchanges.append((answered - asked, float(answer) - (asked + answered) / 2))
            offset = min(exchanges)[1]
            if abs(offset) > abs(largest):
                largest, farthest = offset, rank
        elif world.rank == rank:
            for _ in range(REPEATS):
                question = torch.zeros(1, dtype=torch.float64)
                dist.recv(question, 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    largest, farthest = _gather(world, (largest, farthest))[0]
    found = f"apart by at most {1e3 * abs(largest):.1f} ms"
    if abs(largest) > CLOCK_TOLERANCE_S:
        advice = f"the clock of rank {farthest}'s node is off: start its NTP service (chrony or systemd-timesyncd)"
        return Finding("clocks", "warning", found, advice)
    return Finding("clocks", "ok", found)


def _shared_folder(world: World, output_dir: Path) -> Finding:
    """Every process sees, in the folder for runs, the file that each of the others has written."""
    token = _gather(world, uuid.uuid4().hex)[0]
    own = output_dir / f".preflight-{token}-{world.rank}"
    problem = ""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        own.write_text(platform.node())
    except OSError as error:
        problem = f"rank {world.rank} on {platform.node()}: {own}: {error.strerror}"
    dist.barrier()
    deadline = time.monotonic() + FOLDER_PATIENCE_S
    expected = {f".preflight-{token}-{rank}" for rank in range(world.size)}
    seen: set[str] = set()
    while not problem and seen != expected and time.monotonic() < deadline:
        seen = {path.name for path in output_dir.glob(f".preflight-{token}-*")}
        time.sleep(0.05)
    if not problem and seen != expected:
        problem = f"{platform.node()} sees in {output_dir} {len(seen)} of the {world.size} processes' files"
    problems = [text for text in _gather(world, problem) if text]
    own.unlink(missing_ok=True)
    if problems:
        advice = (
            "checkpoints need one folder that all nodes share and may write to: give it by --output-dir and output_dir"
        )
        return Finding("shared folder", "failed", problems[0], advice)
    return Finding("shared folder", "ok", f"{output_dir.resolve()}: seen by all {world.size} processes")


def _median_time(world: World, prepare: Callable[[], Any], work: Callable[[], Any]) -> float:
    """Median seconds of ``work``, after one try that counts for nothing."""
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


def _gather(world: World, value: Any) -> list[Any]:
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main()
