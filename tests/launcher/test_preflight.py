"""`launcher preflight` on this node, with two processes; and what it says of faults."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from launcher import preflight
from launcher.job import Job
from tests.launcher.command_line import launch


@pytest.mark.slow
def test_this_node_and_a_group_of_two_pass(tmp_path: Path) -> None:
    arguments = ["--nproc-per-node", "2", "--output-dir", tmp_path / "runs"]
    done = launch("preflight", *arguments, timeout=300, COLUMNS="160")
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    rows = {row[1].strip(): row[2].strip() for row in cells}
    for check in ["load fbgemm_gpu", "matrix product on cpu", "all-reduce", "all-to-all", "clocks", "shared folder"]:
        assert rows[check] == "ok"
    assert done.stdout.splitlines()[-1].endswith(" 0 failed")
    assert list((tmp_path / "runs").iterdir()) == []


def test_dry_run_prints_the_processes_it_would_start() -> None:
    done = launch("preflight", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29412", "--dry-run")
    node, group = map(shlex.split, done.stdout.splitlines())
    assert node[1:] == ["-m", "launcher.node_check"]
    assert group[-3:] == ["-m", "launcher.group_check", "runs"]
    assert group[group.index("--nnodes") + 1] == "2"


def test_a_folder_that_cannot_be_made_fails_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = preflight._writable(tmp_path / "file" / "runs")
    assert finding.status == "failed"
    assert "Not a directory" in finding.found
    assert "--output-dir" in finding.advice


def test_a_process_that_ends_without_a_word_is_a_failed_check() -> None:
    code = "import os; print('loading fbgemm_gpu', flush=True); os.kill(os.getpid(), 11)"
    job = Job(Path("x"), (), 1, 2, 0)
    (finding,) = preflight._checks_of([sys.executable, "-c", code], "training stack", job)
    assert finding.status == "failed"
    assert finding.found == "ended with status -11 while loading fbgemm_gpu"


def test_a_foreign_package_named_kernels_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "kernels-0.11.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = [finding for finding in preflight._packages() if finding.check == "kernels"]
    assert finding.status == "failed"
    assert "0.11.5" in finding.found
    assert "uninstall kernels" in finding.advice
