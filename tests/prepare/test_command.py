"""The command line of `mme prepare`: days are added to a set, and options that contradict each other are rejected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.cli import main


def write_day(path: Path, day: int) -> Path:
    rows = "".join(
        f"{user},{user + item},{1_600_000_000 + day * 86400 + item},{item}\n" for user in range(3) for item in range(4)
    )
    path.write_text("user_id,item_id,timestamp,stars\n" + rows)
    return path


def test_prepare_then_add_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = [write_day(tmp_path / f"{day}.csv", day) for day in range(3)]
    out = str(tmp_path / "set")
    assert main(["prepare", "--input", str(days[0]), "--format", "csv", "--min-rating", "1", "--output", out]) == 0
    assert main(["prepare", str(days[1]), str(days[2]), "--add-to", out]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert printed.startswith(
        f"{days[0]}: CSV, separated by comma, with a header\n  user: column user_id (integer ids)\n"
        "  item: column item_id (integer ids)\n  timestamp: column timestamp (seconds since 1970)\n  rating: column stars\n"
    )
    assert f"{days[1]} and 1 more files: CSV" in printed
    assert "1 additions" in printed and "without the feedback asked for" in printed
    info = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert (info["num_users"], info["num_events"], info["unwanted"]) == (3, 27, {"rating below 1": 9})
    assert [file["name"] for file in info["source"]["files"]] == ["0.csv", "1.csv", "2.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "a"], "mme prepare needs --input or --synthetic"),
        (["x.csv", "--output", "ftp://host/set"], "--output: ftp://host/set: ftp:// is not supported"),
        (
            ["--synthetic", "quickstart", "--output", "http://host/set"],
            "--output: http://host/set: http:// is not supported",
        ),
        (["x.csv", "--add-to", "file:///set"], "--add-to: file://set: file:// is not supported"),
        (["ftp://host/x.csv", "--output", "a"], "error: ftp://host/x.csv: ftp:// is not supported"),
        (["x.csv", "--id-type", "number", "--output", "a"], "--id-type number: expected one of auto, integer, text"),
        (["x.csv", "--quoting", "none", "--output", "a"], "--quoting none: expected one of auto, standard, literal"),
        (["--synthetic", "quickstart", "--output", "b", "--no-header"], "--header does not go with --synthetic"),
        (["x.csv", "--format", "csv"], "needs either --output or --add-to"),
        (["x.csv", "--format", "csv", "--output", "a", "--add-to", "b"], "needs either --output or --add-to"),
        (["x.csv", "--add-to", "b", "--min-watch-time", "3"], "--min-watch-time does not go with --add-to"),
        (["--synthetic", "quickstart", "--add-to", "b"], "--add-to does not go with --synthetic"),
        (["--synthetic", "quickstart", "--output", "b", "--click-column", "c"], "--click-column does not go with"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "/dev/stdin", "/dev/null"])
def test_only_regular_files_are_read(tmp_path: Path, path: str) -> None:
    """They are rejected immediately and by name; reading a pipe without a writer or a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-m", "mme", "prepare", path, "--output", "set"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input="1,2,3\n", capture_output=True, text=True, timeout=120
    )
    message = f"error: {path}: not a regular file: expected a file of interactions\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["a\0b.csv", "a\nb.csv", "x" * 300 + ".csv", "y/" * 3000])
def test_paths_that_can_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["prepare", name, "--output", str(tmp_path / "set")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "a.csv").write_text("user,item,time\n1,2,3\n")
    assert main(["prepare", str(tmp_path / "a.csv"), "--output", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupted_while_duckdb_works(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 2_000_000, 2_000_000) for name in ("user", "item", "time")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    command = [sys.executable, "-m", "mme", "prepare", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "set")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    # Everything has been read; from here on DuckDB numbers and sorts.
    read = tmp_path / ".set.partial" / "work" / "read.json"
    while not read.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert not (tmp_path / "set").exists()
