"""Multi-node jobs on network namespaces of this machine, each with its own launcher and torchrun."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launcher.command_line import CONFIG, REPOSITORY
from tests.launcher.hosts import Host, hosts, why_not
from tests.test_recovery import check_same, data, reached
from tests.test_train import SMALL, records

__all__ = ["data"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE_S = 300
JOB = [*SMALL, "data.batch_size=4", "train.epochs=6", "train.checkpoint_every=2", "train.hang_timeout_s=20"]


@pytest.fixture(scope="module", autouse=True)
def hosts_can_be_made() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the same job on one host with four processes."""
    run = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run(command(data, run, "--nproc-per-node", "4"), cwd=REPOSITORY, env=environment(), check=True)
    return run


def command(data: Path, run: Path, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "launcher", "run", "--config", CONFIG, *options]
    return [*launcher, f"data.path={data}", f"output_dir={run}", *JOB]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@dataclass(frozen=True)
class Node:
    """A host and the launcher that runs on it."""

    host: Host
    launcher: subprocess.Popen[str]
    errors: Path

    @property
    def said(self) -> str:
        return self.errors.read_text()


@contextmanager
def cluster(count: int, data: Path, run: Path, *options: str) -> Iterator[list[Node]]:
    """``count`` hosts with one process each and the rendezvous on the first."""
    with hosts(count) as made:
        endpoint = ["--rdzv-endpoint", f"{made[0].address}:29500"]
        line = command(data, run, "--nnodes", str(count), "--nproc-per-node", "1", *endpoint, *options)
        nodes = []
        for host in made:
            errors = run.parent / f"errors-{host.address}.txt"
            with errors.open("w") as file:
                launcher = host.start(line, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=file)
            nodes.append(Node(host, launcher, errors))
        try:
            yield nodes
        finally:
            for node in nodes:
                node.launcher.kill()
                node.launcher.wait()


def wait_until(condition: Callable[[], bool], nodes: list[Node]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "\n".join(node.said for node in nodes)
        time.sleep(0.02)


def end(nodes: list[Node]) -> list[int]:
    """Waits for all launchers and returns their exit statuses."""
    wait_until(lambda: all(node.launcher.poll() is not None for node in nodes), nodes)
    return [node.launcher.returncode for node in nodes]


def test_four_hosts_train_as_one_machine_with_four_processes(data: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with cluster(4, data, run) as nodes:
        assert end(nodes) == [0] * 4, "\n".join(node.said for node in nodes)
    check_same(run, alone)


@pytest.mark.parametrize("number", [0, 2], ids=["rendezvous host", "another"])
def test_a_host_that_is_cut_off_and_comes_back_costs_a_restart(
    data: Path, alone: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    with cluster(4, data, run) as nodes:
        wait_until(lambda: reached(run, 3), nodes)
        cut = nodes[number]
        cut.host.plug("down")
        # Each side notices the cut; the launchers may print nothing until they reach the rendezvous again.
        wait_until(lambda: all("hangs (" in node.said for node in nodes), nodes)
        cut.host.plug("up")
        assert end(nodes) == [0] * 4, "\n".join(node.said for node in nodes)
        again = "once all 4 nodes have joined, all workers restart and resume from the last complete checkpoint"
        assert any(again in node.said for node in nodes)
    check_same(run, alone)


def test_a_host_that_stays_cut_off_ends_the_job_on_both_sides(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with cluster(2, data, run, "--rdzv-timeout", "30") as nodes:
        wait_until(lambda: reached(run, 3), nodes)
        nodes[1].host.plug("down")
        assert end(nodes) == [1, 1]
        first, second = (node.said.splitlines() for node in nodes)
    endpoint = f"{nodes[0].host.address}:29500"
    missing = (
        f"launcher: fewer than 2 nodes joined at {endpoint} within 30 s: a node is down, unreachable or not started"
    )
    resume = "launcher: to resume from the last complete checkpoint, run the same command on all nodes"
    assert first[-2:] == [missing, resume]
    silent = f"launcher: the rendezvous at {endpoint} does not answer: its node is down, unreachable or has given up"
    assert second[-2:] == [silent, resume]
    for said in (first, second):
        assert not [line for line in said if "Traceback" in line or "c10d" in line]


def test_an_elastic_job_goes_on_with_the_hosts_that_are_left(data: Path, tmp_path: Path) -> None:
    """One of three hosts is asked to stop, another is then cut off; the one with the rendezvous ends the job alone."""
    run = tmp_path / "run"
    with cluster(3, data, run, "--nnodes", "1:3", "--rdzv-timeout", "60") as nodes:
        first, cut, stopped = nodes
        wait_until(lambda: reached(run, 3), nodes)
        stopped.launcher.terminate()
        wait_until(lambda: stopped.launcher.poll() is not None, nodes)
        assert stopped.launcher.returncode == 143
        wait_until(lambda: sizes(run)[-1] == 2, nodes)
        cut.host.plug("down")
        wait_until(lambda: first.launcher.poll() is not None, nodes)
        assert first.launcher.returncode == 0, first.said
    assert "once at least 1 nodes have joined, all workers restart" in first.said
    assert sizes(run) == [3, 2, 1]
    steps = [line["step"] for line in records(run, "train")]
    assert steps == sorted(set(steps))


def sizes(run: Path) -> list[int]:
    """The numbers of processes of the attempts, one after another; several attempts may have the same."""
    return [size for size, _ in itertools.groupby(line["world_size"] for line in records(run, "run"))]
