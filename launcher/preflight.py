"""Checks a node and the group of nodes before a job starts there. Every problem comes with advice.

This module does the checks that need no training library. Separate processes load the training stack
(`launcher.node_check`) and form the group (`launcher.group_check`).
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher import torchrun
from launcher.findings import Finding, read_lines
from launcher.job import Job, gpus, items_of
from launcher.memory import checkpoint_bytes, memory_of, whole_checkpoint_bytes
from launcher.package_check import check_packages
from launcher.shape import Shape
from mme.devices import device_of, in_words
from mme.errors import one_line
from mme.files import open_to_read, remove, replacing

SLOWEST_GROUP_S = 1800
MEMORY_PER_PROCESS = 2 * 2**30
DISK_SCARCE, DISK_TOO_LITTLE = 20 * 2**30, 2**30
SHARED_MEMORY = 2**30
NODES_TOGETHER = "start the same command on every node with the same --nnodes and --rdzv-endpoint, a host and port that all can reach"
TRIAL_BYTES = 16 * 2**20
CONTROL_GROUP_FILES = [  # (limit, usage) of cgroups version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


@dataclass(frozen=True)
class Needs:
    """Resources of one node that a job needs: bytes of host memory by part, and bytes of disk for checkpoints."""

    memory: dict[str, float]
    disk: float


def needs_of(job: Job, items: int | None) -> Needs:
    """Resources of this node that ``job`` needs, as `plan` predicts them.

    Raises:
        UserError: the configuration is wrong, or neither ``items`` nor a data set gives the number of items.
    """
    config = job.load()
    shape = Shape(config, job.nnodes * job.nproc_per_node, job.nproc_per_node, items or items_of(config))
    training = MEMORY_PER_PROCESS if gpus() else memory_of(shape, device_of("cpu", job.nproc_per_node)).total
    memory = {"training": training, "checkpoint copy": checkpoint_bytes(shape)}
    kept = config.train.keep_checkpoints + 2  # plus the best one and the one being written
    if config.train.checkpoint_incremental:
        kept += 2  # their bases
    return Needs(
        {part: job.nproc_per_node * size for part, size in memory.items()}, kept * whole_checkpoint_bytes(shape)
    )


def preflight(job: Job, output_dir: Path, needs: Needs | None = None) -> int:
    """Prints the findings and returns 1 if a check failed, otherwise 0. ``needs`` are those of the job, if known."""
    findings = [
        *check_packages("cuda" if gpus() else "cpu"),
        *_gpus(),
        _memory(job.nproc_per_node, needs),
        _shared_memory(),
        _disk(output_dir, needs),
        _writable(output_dir),
    ]
    node_command, group_command = commands(job, output_dir)
    findings += _checks_of(node_command, "training stack", job)
    if all(finding.status != "failed" for finding in findings) or job.nnodes > 1:  # other nodes wait for this one
        findings += _checks_of(group_command, "group", job)
    else:
        findings.append(Finding("group", "warning", "not checked", "fix the failed checks first"))
    _show(findings)
    return 1 if any(finding.status == "failed" for finding in findings) else 0


def commands(job: Job, output_dir: Path) -> list[list[str]]:
    """The two processes that preflight starts: one for this node's libraries, one for the group."""
    return [
        [sys.executable, "-m", "launcher.node_check"],
        torchrun.command(job, ["launcher.group_check", str(output_dir)]),
    ]


def _checks_of(command: list[str], name: str, job: Job) -> list[Finding]:
    environment = {**os.environ, **torchrun.environment(job)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SLOWEST_GROUP_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding(name, "failed", f"no answer after {SLOWEST_GROUP_S} s", NODES_TOGETHER)]
    findings = read_lines(done.stdout)
    if done.returncode and not any(finding.status == "failed" for finding in findings):
        begun = [line for line in done.stdout.splitlines() if line.startswith("loading ")]
        causes = [line.strip() for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
        causes = [line for line in causes if not line.startswith(torchrun.LAST_WORDS)]
        found = (
            causes[-1]
            if causes
            else (f"ended with status {done.returncode}" + (f" while {begun[-1]}" if begun else ""))
        )
        apart = "RendezvousTimeoutError" in done.stderr
        advice = NODES_TOGETHER if apart else f"for the full output run: {shlex.join(command)}"
        findings.append(Finding(name, "failed", found, advice))
    return findings


def _gpus() -> list[Finding]:
    if not gpus():
        return [Finding("GPUs", "ok", "none: training will use the CPU; GPUs must appear in `nvidia-smi -L`")]
    query = "index,name,memory.total,memory.used,driver_version"
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    findings = []
    for row in answer.stdout.splitlines():
        index, name, total_mib, used_mib, driver = (cell.strip() for cell in row.split(","))
        found = f"{name}, driver {driver}, {used_mib} of {total_mib} MiB in use"
        busy = used_mib.isdigit() and int(used_mib) > 1024
        advice = "another process uses memory of this GPU: `nvidia-smi` names it" if busy else ""
        findings.append(Finding(f"GPU {index}", "warning" if busy else "ok", found, advice))
    return findings or [Finding("GPUs", "failed", "nvidia-smi gives no details of any GPU", "see its output")]


def _memory(processes: int, needs: Needs | None) -> Finding:
    available = _available_memory()
    found = f"{in_words(available)} available"
    if needs is None:
        if available >= MEMORY_PER_PROCESS * processes:
            return Finding("memory", "ok", found)
        advice = f"less than {in_words(MEMORY_PER_PROCESS)} for each of {processes} processes: free memory or run fewer processes"
        return Finding("memory", "warning", found, advice)
    total = sum(needs.memory.values())
    parts = ", ".join(f"{part} {in_words(size)}" for part, size in needs.memory.items())
    found += f"; the job's {processes} processes need {in_words(total)} ({parts})"
    if available >= total:
        return Finding("memory", "ok", found)
    advice = (
        f"{in_words(total - available)} too little: use more nodes or fewer processes per node, end other programs, or "
        "raise the container's limit"
    )
    return Finding("memory", "failed", found, advice)


def _available_memory() -> float:
    """Bytes that new processes may allocate, limited by the machine and, in a container, by its control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = float(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    for limit, used in CONTROL_GROUP_FILES:
        try:  # only one version's files exist; without a limit the file contains "max" or a huge number
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return available


def _shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", "warning", "no /dev/shm", "NCCL needs it to exchange data within a node")
    size = shutil.disk_usage("/dev/shm").total
    scarce = size < SHARED_MEMORY
    advice = "give the container more: docker run --ipc host (or --shm-size 8g)" if scarce else ""
    return Finding("shared memory", "warning" if scarce else "ok", f"{in_words(size)} in /dev/shm", advice)


def _disk(output_dir: Path, needs: Needs | None) -> Finding:
    existing = next(path for path in [output_dir.resolve(), *output_dir.resolve().parents] if path.is_dir())
    free = shutil.disk_usage(existing).free
    found = f"{in_words(free)} free at {existing}"
    advice = "free space, choose another folder (--output-dir, output_dir) or lower train.keep_checkpoints"
    if needs is not None:
        found += f"; the job's checkpoints need up to {in_words(needs.disk)}"
        return Finding("disk", "failed", found, advice) if free < needs.disk else Finding("disk", "ok", found)
    if free < DISK_TOO_LITTLE:
        return Finding("disk", "failed", found, advice)
    advice = "checkpoints of a large catalogue need more: --config FILE checks how much" if free < DISK_SCARCE else ""
    return Finding("disk", "warning" if advice else "ok", found, advice)


def _writable(output_dir: Path) -> Finding:
    """Writes, syncs, renames and reads back a file, as checkpoints are written."""
    path = output_dir / f".preflight-{secrets.token_hex(8)}"
    content = os.urandom(TRIAL_BYTES)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with replacing(path, output_dir) as partial:
            partial.write_bytes(content)
        seconds = time.perf_counter() - started
        with open_to_read(path, output_dir) as file:
            same = file.read() == content
    except OSError as error:
        advice = "checkpoints are written there: make it writable or choose another folder (--output-dir, output_dir)"
        return Finding("checkpoint folder", "failed", f"{output_dir}: {error.strerror}", advice)
    finally:
        remove(path)
    if not same:
        return Finding("checkpoint folder", "failed", f"{output_dir}: data changed on the disk", "use another disk")
    return Finding(
        "checkpoint folder", "ok", f"{output_dir}: {TRIAL_BYTES / 1e6 / seconds:.0f} MB/s written and synced"
    )


def _show(findings: list[Finding]) -> None:
    colours: dict[str, str] = {"ok": "green", "warning": "yellow", "failed": "red"}
    table = Table(title="Preflight", title_justify="left")
    for column in ("check", "status", "found and what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        advice = f"\n→ {finding.advice}" if finding.advice else ""
        table.add_row(finding.check, status, (one_line(finding.found) + advice).replace("[", r"\["))
    Console().print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in colours}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
