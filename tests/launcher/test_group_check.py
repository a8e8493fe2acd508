"""The checks of preflight between processes and hosts: links, clocks and the shared folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import group_check, link_check
from launcher.findings import Finding, read_lines
from mme.distributed.world import World
from tests.distributed.processes import run_on
from tests.launcher.command_line import REPOSITORY
from tests.launcher.hosts import Host, hosts, why_not


def check_as(world: World, check: str, by_rank: list[object]) -> Finding:
    """Runs a check of the group in which each rank is a node and gets its own value."""
    os.environ["GROUP_RANK"] = str(world.rank)
    os.environ["LOCAL_RANK"] = "0"
    group = group_check.group_of(world)
    own = by_rank[world.rank]
    if check == "clocks":
        return group_check.clocks(group, lambda: time.time() + own)  # type: ignore[operator]
    if check == "shared folder":
        return group_check.shared_folder(group, Path(str(own)), patience_s=2)
    plain = link_check.there_and_back(world.rank, world.device)

    def exchange(partner: int, num_bytes: int, times: int) -> None:
        time.sleep(float(own) if num_bytes > 1000 else 0)  # type: ignore[arg-type]
        plain(partner, num_bytes, times)

    pairs = link_check.measure_pairs(world.rank, group.peers, exchange, "cpu")
    found = [pair for pairs in group_check.gather(world, pairs) for pair in pairs]
    return link_check.judge(found, group.name, "cpu")


def test_a_clock_that_is_off_is_named_with_its_node() -> None:
    for finding in run_on(2, check_as, "clocks", [0.0, 0.0]):
        assert finding.status == "ok"
    for finding in run_on(2, check_as, "clocks", [0.0, -90.0]):
        assert finding.status == "failed"
        assert f"the clock of rank 1 on {socket.gethostname()} is 90.0 s behind rank 0's" in finding.found
        assert "NTP" in finding.advice


@pytest.mark.slow
def test_rank_0_is_named_if_its_clock_is_the_wrong_one_of_three() -> None:
    for finding in run_on(3, check_as, "clocks", [3600.0, 0.0, 0.0]):
        assert finding.found == f"the clock of rank 0 on {socket.gethostname()} is 3600.0 s ahead of the others'"
    for finding in run_on(3, check_as, "links", [0.0, 0.0, 3.0]):
        assert finding.status == "warning"
        assert f"all 2 slow pairs include rank 2 on {socket.gethostname()}" in finding.found
        assert "NCCL_SOCKET_IFNAME" in finding.advice


def test_folders_that_are_not_shared_fail(tmp_path: Path) -> None:
    for finding in run_on(2, check_as, "shared folder", [tmp_path / "one", tmp_path / "other"]):
        assert finding.status == "failed"
        assert finding.found.startswith(f"rank 0 on {socket.gethostname()} does not see in {tmp_path}/one what rank 1")
    assert not list(tmp_path.glob("*/.preflight*"))


def test_every_pair_meets_once_and_rounds_are_disjoint() -> None:
    for size in range(1, 9):
        rounds = list(link_check.tournament(list(range(size))))
        for pairs in rounds:
            met = [rank for pair in pairs for rank in pair]
            assert len(met) == len(set(met))
        every = {frozenset(pair) for pairs in rounds for pair in pairs}
        assert len(every) == sum(map(len, rounds)) == size * (size - 1) // 2


def test_a_node_that_cannot_be_reached_is_named() -> None:
    with link_check.listener("127.0.0.1") as (address, port), link_check.listener("127.0.0.1") as (_, closed):
        pass
    with link_check.listener("127.0.0.1") as (address, port):
        others = {1: ("node1", address, port), 2: ("node2", address, closed), 3: None}
        refused, absent = link_check.unreachable("node0 (127.0.0.1)", others)
    assert refused == "node0 (127.0.0.1) cannot reach node2 (127.0.0.1): Connection refused"
    assert absent.startswith("node 3 did not publish its address")


@pytest.mark.slow
def test_the_others_report_a_process_that_dies(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, launcher.group_check as check\n"
        "stay = check._all_to_all\n"
        # Wait until torchrun has noticed the death of the other process and asked this one to exit.
        "check._all_to_all = lambda group: os._exit(9) if group.world.rank else time.sleep(2) or stay(group)\n"
        f"sys.argv[1:] = [{str(tmp_path)!r}]\n"
        "check.main()"
    )
    (tmp_path / "dies.py").write_text(code)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "dies.py")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    findings = {finding.check: finding for finding in read_lines(done.stdout)}
    assert findings["all-reduce"].status == "ok"
    assert findings["all-to-all"].status == "failed", done.stdout + done.stderr
    assert "a process or a link has failed" in findings["all-to-all"].advice


CHECK_GROUP = """
import os, sys
from pathlib import Path
from launcher import torchrun
from launcher.job import Job
nodes, endpoint, folder = sys.argv[1:]
job = Job(Path(), (), int(nodes), 1, 0, endpoint)
line = torchrun.command(job, ["launcher.group_check", folder])
os.execve(line[0], line, {**os.environ, **torchrun.environment(job)})
"""


def check_group_on(made: list[Host], folder: Path) -> list[dict[str, Finding]]:
    """The group's findings on hosts of one process each, with the rendezvous on the first."""
    command = [sys.executable, "-c", CHECK_GROUP, str(len(made)), f"{made[0].address}:29500", str(folder)]
    processes = [
        host.start(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for host in made
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    return [{finding.check: finding for finding in read_lines(output)} for output in outputs]


@pytest.fixture
def three_hosts() -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with hosts(3) as made:
        yield made


@pytest.mark.slow
def test_two_nodes_without_a_connection_are_named(three_hosts: list[Host], tmp_path: Path) -> None:
    second, third = three_hosts[1:]
    # Packets from the second host to the third go to a hardware address that does not exist.
    nobody = ["neighbour", "add", third.address, "lladdr", "02:00:00:00:00:99", "dev", "eth0"]
    subprocess.run(["ip", "-n", second.name, *nobody], check=True)
    for findings in check_group_on(three_hosts, tmp_path):
        assert findings["links"].status == "failed"
        assert (
            f"({second.address}) cannot reach {socket.gethostname()} ({third.address}): timed out"
            in findings["links"].found
        )
        assert "all TCP ports must be open" in findings["links"].advice


@pytest.mark.slow
def test_a_node_with_a_slow_cable_is_named(three_hosts: list[Host], tmp_path: Path) -> None:
    limit = ["root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "500ms"]
    limited = ["tc", "-n", three_hosts[2].name, "qdisc", "add", "dev", "eth0", *limit]
    if shutil.which("tc") is None or subprocess.run(limited, capture_output=True, check=False).returncode:
        pytest.skip("this kernel cannot limit a link's rate (tc qdisc tbf)")
    for findings in check_group_on(three_hosts, tmp_path):
        assert findings["links"].status == "warning", findings
        assert f"slow pairs include rank 2 on {socket.gethostname()}" in findings["links"].found
