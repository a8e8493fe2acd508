"""Checks a node, and the group of nodes, before a job is started there; every finding says what to do.

What needs no library is looked at here. Loading the training stack, and the group, happen in processes of their own
(`launcher.node_check`, `launcher.group_check`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher import torchrun
from launcher.findings import Finding, in_words, read_lines
from launcher.job import Job, gpus

PROJECT = Path(__file__).resolve().parents[1]
SLOWEST_GROUP_S = 1800
MEMORY_PER_PROCESS = 2 * 2**30
DISK_SCARCE, DISK_TOO_LITTLE = 20 * 2**30, 2**30
SHARED_MEMORY = 2**30
TRIAL_BYTES = 16 * 2**20


def preflight(job: Job, output_dir: Path) -> int:
    """Checks and prints; 1 if something failed, else 0."""
    findings = [
        *_packages(),
        *_gpus(),
        _memory(job.nproc_per_node),
        _shared_memory(),
        _disk(output_dir),
        _writable(output_dir),
    ]
    node_command, group_command = commands(job, output_dir)
    findings += _checks_of(node_command, "training stack", job)
    if all(finding.status != "failed" for finding in findings) or job.nnodes > 1:  # other nodes wait for this one
        findings += _checks_of(group_command, "group", job)
    else:
        findings.append(Finding("group", "warning", "not checked", "mend what failed first"))
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
        return [Finding(name, "failed", f"no answer after {SLOWEST_GROUP_S} s", "see whether every node was started")]
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
        findings.append(Finding(name, "failed", found, f"to see it all: {' '.join(command)}"))
    return findings


def _packages() -> list[Finding]:
    """Installed versions against the pins, and a foreign package in the place of this project's kernels."""
    findings = []
    stack = "cuda" if gpus() else "cpu"
    for line in (PROJECT / "requirements" / f"{stack}.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        if not pinned:
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding(name, "failed", "not installed", f"run `make setup` (requirements/{stack}.txt)"))
            continue
        agrees = found.partition("+")[0] == pinned
        advice = "" if agrees else f"tested with {pinned}: `make setup` installs it (requirements/{stack}.txt)"
        findings.append(Finding(name, "ok" if agrees else "warning", found, advice))
    try:
        found = version("kernels")
        advice = "it hides this project's own package kernels: `python -m pip uninstall kernels`"
        findings.append(Finding("kernels", "failed", f"foreign package kernels {found}", advice))
    except PackageNotFoundError:
        findings.append(Finding("kernels", "ok", "no foreign package of that name"))
    return findings


def _gpus() -> list[Finding]:
    if not gpus():
        advice = "training runs on CPU processes; for GPUs, `nvidia-smi -L` must list them"
        return [Finding("GPUs", "ok", "none: " + advice)]
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
        advice = "another process holds memory there: `nvidia-smi` names it" if busy else ""
        findings.append(Finding(f"GPU {index}", "warning" if busy else "ok", found, advice))
    return findings or [Finding("GPUs", "failed", "nvidia-smi lists none in detail", "see what `nvidia-smi` says")]


def _memory(processes: int) -> Finding:
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    scarce = available < MEMORY_PER_PROCESS * processes
    advice = (
        f"less than {in_words(MEMORY_PER_PROCESS)} for each of {processes} processes: end others, or run fewer"
        if scarce
        else ""
    )
    return Finding("memory", "warning" if scarce else "ok", f"{in_words(available)} available", advice)


def _shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("shared memory", "warning", "no /dev/shm", "NCCL exchanges data of one node through it")
    size = shutil.disk_usage("/dev/shm").total
    scarce = size < SHARED_MEMORY
    advice = "docker run --ipc host (or --shm-size 8g) gives more" if scarce else ""
    return Finding("shared memory", "warning" if scarce else "ok", f"{in_words(size)} in /dev/shm", advice)


def _disk(output_dir: Path) -> Finding:
    existing = next(path for path in [output_dir.resolve(), *output_dir.resolve().parents] if path.is_dir())
    free = shutil.disk_usage(existing).free
    found = f"{in_words(free)} free at {existing}"
    if free < DISK_TOO_LITTLE:
        return Finding("disk", "failed", found, "make room, or give another folder by --output-dir and output_dir")
    advice = (
        "checkpoints of large catalogues take more: train.keep_checkpoints limits them" if free < DISK_SCARCE else ""
    )
    return Finding("disk", "warning" if advice else "ok", found, advice)


def _writable(output_dir: Path) -> Finding:
    """A file is written whole, renamed and read back, as a checkpoint is."""
    partial, final = (output_dir / f".preflight-{os.getpid()}{suffix}" for suffix in (".partial", ""))
    content = os.urandom(TRIAL_BYTES)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)
        seconds = time.perf_counter() - started
        same = final.read_bytes() == content
    except OSError as error:
        advice = "checkpoints go there: make it writable, or give another folder by --output-dir and output_dir"
        return Finding("checkpoint folder", "failed", f"{output_dir}: {error.strerror}", advice)
    finally:
        _remove([partial, final])
    if not same:
        return Finding("checkpoint folder", "failed", f"{output_dir}: read back other bytes", "use another disk")
    return Finding(
        "checkpoint folder", "ok", f"{output_dir}: {TRIAL_BYTES / 1e6 / seconds:.0f} MB/s written and synced"
    )


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            path.unlink()


def _show(findings: list[Finding]) -> None:
    colours: dict[str, str] = {"ok": "green", "warning": "yellow", "failed": "red"}
    table = Table(title="Preflight", title_justify="left")
    for column in ("check", "status", "found and what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        advice = f"\n→ {finding.advice}" if finding.advice else ""
        table.add_row(finding.check, status, (finding.found + advice).replace("[", r"\["))
    Console().print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in colours}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
