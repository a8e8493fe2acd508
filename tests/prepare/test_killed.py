"""If `mme prepare` is killed anywhere, it leaves the old set or the new one; the next run cleans up and finishes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mme.errors import UserError
from mme.prepare import pipeline as prepare_module
from mme.prepare.pipeline import add_events, prepare
from mme.prepare.readers import SourceFile
from mme.prepare.replacement import FolderReplacement
from mme.prepare.synthetic import prepare_synthetic

REPOSITORY = Path(__file__).parents[2]
SCENARIOS = ["prepare", "add", "add-without-exchange"]


def kill_again_and_again(folder: Path, scenario: str, stride: int) -> int:
    command = [sys.executable, "-m", "tests.prepare.killed", str(folder), scenario, str(stride)]
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


def write_days(folder: Path) -> list[Path]:
    """Two files with malformed rows and a feature; users and items overlap."""
    for day in range(2):
        rows = [f"u{n % 7},{n % 11 + day},{1000 * day + n},{'abc'[n % 3]}" for n in range(60)]
        rows[5:5] = ["u1,2", f"u1,2,{-day - 1},a"]
        (folder / f"{day}.csv").write_text("\n".join(["user,item,time,kind", *rows, ""]))
    return [folder / f"{day}.csv" for day in range(2)]


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("added", [False, True])
def test_an_interrupted_run_goes_on_from_the_events_that_it_had_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: bool
) -> None:
    days = write_days(tmp_path)
    options: dict[str, Any] = {"max_malformed_share": 0.1}

    def make(name: str) -> dict[str, Any]:
        if added:
            return add_events(days[1:], tmp_path / name, **options)
        return prepare(days, "csv", tmp_path / name, feature_columns=["kind"], **options)

    for name in ("set", "other") if added else ():
        prepare(days[:1], "csv", tmp_path / name, feature_columns=["kind"], **options)

    def unread(source: SourceFile) -> None:
        raise AssertionError(f"{source.path} is read again")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_histories", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make("set")
    assert (tmp_path / ".set.partial" / "work" / "read.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(SourceFile, "batches", unread)
        found = make("set")
    expected = make("other")
    assert found | {"name": ""} == expected | {"name": ""}
    assert found["malformed_rows"] == 4 and found["features"] == {"kind": 3}
    files = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir() if path.name != "dataset.json"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir() if path.name in files} == files
    assert not (tmp_path / ".set.partial").exists()


@pytest.mark.parametrize("change", ["input", "settings", "generator"])
def test_what_another_run_had_read_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    days = write_days(tmp_path)
    options: dict[str, Any] = {"max_malformed_share": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_histories", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(days, "csv", tmp_path / "set", **options)
    if change == "generator":
        prepare_synthetic("quickstart", tmp_path / "set", users=5, items=100)
        assert not (tmp_path / "set" / "work").exists()
        return
    if change == "input":
        days[1].write_text(days[1].read_text() + "u1,77,5000,a\n")
    else:
        options["min_rating"], options["columns"] = 4, {"rating": "item"}
    found = prepare(days, "csv", tmp_path / "set", **options)
    expected = prepare(days, "csv", tmp_path / "other", **options)
    assert found | {"name": ""} == expected | {"name": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.csv", "1.csv", "other", "set"]


def test_two_at_once(tmp_path: Path) -> None:
    """The second command is rejected while the first one writes, and not afterwards."""
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
