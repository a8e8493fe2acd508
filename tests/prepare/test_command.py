"""`mme prepare` as typed: days added to a set, and options that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

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
    printed = capsys.readouterr().out
    assert "1 additions" in printed and "without the feedback asked for" in printed
    info = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert (info["num_users"], info["num_events"], info["unwanted"]) == (3, 27, {"rating below 1": 9})
    assert [file["name"] for file in info["source"]["files"]] == ["0.csv", "1.csv", "2.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
