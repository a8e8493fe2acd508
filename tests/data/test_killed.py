"""Killed anywhere, `mme prepare` leaves the old set or the new one; the next run clears up and gets there."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mme.data.prepare import prepare
from mme.data.replacement import FolderReplacement
from mme.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SCENARIOS = ["prepare", "add", "add-without-exchange"]


def kill_again_and_again(folder: Path, scenario: str, stride: int) -> int:
    command = [sys.executable, "-m", "tests.data.killed", str(folder), scenario, str(stride)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = re.search(r"(\d+) kills survived", run.stdout)
    assert found
    return int(found[1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed(tmp_path: Path, scenario: str) -> None:
    assert kill_again_and_again(tmp_path, scenario, 7) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_file_operation(tmp_path: Path, scenario: str) -> None:
    assert kill_again_and_again(tmp_path, scenario, 1) >= 20


def test_two_at_once(tmp_path: Path) -> None:
    """The second is refused while the first writes, and not afterwards."""
    (tmp_path / "a.csv").write_text("user,item,time\n1,1,1\n1,2,2\n1,3,3\n")
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with FolderReplacement(tmp_path / "out"):
            held.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(UserError, match=r"out: another `mme prepare` is writing it"):
            prepare([tmp_path / "a.csv"], "csv", tmp_path / "out")
        assert (tmp_path / ".out.partial").is_dir()  # the first one's
    finally:
        go_on.set()
        thread.join()
    assert prepare([tmp_path / "a.csv"], "csv", tmp_path / "out")["num_events"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out"]
