"""Text from a run's files cannot run, load or hide anything in the page or in the command to copy."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mme.cli import main
from mme.errors import UserError, one_line
from mme.report.page import write_compared_report, write_report
from mme.report.results import read_run
from mme.report.text import shell_command
from tests.report.pages import EVALUATIONS, EXPERTS, RUN, Page, evaluation, learned, train_records, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{7*7}}\x1b[2J\u202e"
TAGS = "meta title style main header h1 h2 h3 p br div span b section ul li table thead tbody tr th td noscript figure "
TAGS += "figcaption script html head body pre details summary"


def hostile_records() -> list[dict[str, Any]]:
    """Records with HOSTILE in place of every string."""
    found = learned()
    for name in ("view", "popularity", "position"):
        found["routing"][name] = found["routing"][name] | {"groups": [HOSTILE, "b", "c"]}
    about = {"protocol": HOSTILE, "sort_rule": HOSTILE, "targets_sha256": HOSTILE, "seen": HOSTILE, HOSTILE: HOSTILE}
    info = {"time": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}, "parameters": {HOSTILE: 3}}
    return [
        RUN | info,
        *train_records(),
        EXPERTS,
        evaluation(HOSTILE, "valid", 100, 0.2) | about,
        evaluation(HOSTILE, "test", 100, 0.2) | about | {"insight": found},
        evaluation("popularity", "test", 100, 0.3) | about,
        {"kind": HOSTILE, "step": 3},
    ]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "a'$(touch x);\n<h1>", hostile_records())
    data = {"name": HOSTILE, HOSTILE: HOSTILE, "num_users": 3}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(data))
    return run


def check_inert(page: Page) -> None:
    assert page.loads == [] and set(page.counts) <= set(TAGS.split())
    assert not [name for name in page.attributes if name.startswith("on") or name in ("style", "href", "src")]
    assert not any(char in page.source for char in "\x1b\u202e\x00")
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in page.scripts
    ]
    style = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert page.policy == (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    )


def test_strings_from_files_are_text_everywhere(hostile: Path) -> None:
    page = Page(write_report(hostile))
    check_inert(page)
    shown = one_line(HOSTILE)
    assert page.text.count(shown) >= 10 and "\\x1b[2J\\u202e" in shown and "{{7*7}}" in shown
    assert shown in page.series()
    assert page.counts["script"] == 3  # the charts' data, Vega and the code that embeds the charts


def test_several_hostile_runs_are_text_too(hostile: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "<b>", hostile_records(), "train.lr=0.5")
    check_inert(Page(write_compared_report([hostile, other], tmp_path / "both.html")))


def test_command_to_reproduce_is_one_line_that_a_shell_reads_as_the_folder(hostile: Path) -> None:
    page = Page(write_report(hostile))
    command = page.text[page.text.index("Reproduce") :].strip().split("\n")[1].strip()
    script = command.replace("torchrun", "printf '%s\\0'", 1)
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")
    assert words[:6] == ["--nproc-per-node", "2", "-m", "mme", "train", "--config"]
    assert words[6:8] == [str(hostile / "config.yaml"), f"output_dir={hostile}-again"]
    assert not (Path.cwd() / "x").exists()


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_the_shell_returns_any_words_unchanged(words: list[str]) -> None:
    command = shell_command(words)
    assert command.isprintable()
    output = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, env={"LC_ALL": "C"}
    )
    assert output.stdout.decode().split("\0")[:-1] == words


def test_plain_words_are_quoted_as_python_quotes_them() -> None:
    words = ["mme", "a b", "it's", "$HOME", ""]
    assert shell_command(words) == shlex.join(words)


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "train", "step": "ten"}, "step: expected a whole number, found 'ten'"),
    ({"kind": "train"}, "step: missing"),
    ({"kind": "train", "step": -1}, "step: expected greater than or equal to 0, found -1"),
    ({"kind": "train", "step": 1, "loss": "low"}, "loss: expected a number, found 'low'"),
    ({"kind": "train", "step": 10**30}, "step: expected less than or equal to 9007199254740992"),
    ({"kind": "run", "parameters": {"tables": "many"}}, "parameters.tables: expected a whole number, found 'many'"),
    ({"kind": "run", "world_size": 0}, "world_size: expected greater than or equal to 1, found 0"),
    ({"kind": "eval", "step": 1, "model": 3}, "model: expected a string, found 3"),
    ({"kind": "eval", "step": 1, "hr@10": [1]}, "hr@10: expected a number, found [1]"),
    ({"kind": "eval", "step": 1, "ndcg@10": 1.5}, "ndcg@10: expected a number from 0 to 1, found 1.5"),
    ({"kind": "eval", "step": 1, "mrr": float("nan")}, "mrr: expected a number from 0 to 1, found nan"),
    (
        {"kind": "eval", "step": 1, "insight": learned() | {"similarity": [[1]] * 2}},
        "insight.similarity: expected as many",
    ),
    ({"kind": "eval", "step": 1, "insight": {}}, "insight.singular_values: missing"),
    ({"kind": "experts", "step": 1, "load": 3, "blocks": [0]}, "load: expected a list, found 3"),
    ({"kind": "experts", "step": 1, "load": [[[0.5], [0.5, 0.5]]], "blocks": [0]}, "load: expected shares by block"),
    (
        {"kind": "experts", "step": 1, "load": [[[0.5]]], "blocks": [0, 1]},
        "load: expected a list for each of the 2 blocks",
    ),
]


@pytest.mark.parametrize(("record", "message"), DAMAGED)
def test_damaged_record_is_named_by_file_line_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run", [RUN, record])
    assert main(["report", "--run", str(run)]) == 2
    printed = capsys.readouterr().err
    assert f"{run / 'metrics.jsonl'}: line 2: {message}" in printed and printed.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"kind": "train", "step": ' + "9" * 5000 + "}", '{"kind": 3}'])
def test_lines_that_are_not_records_are_named(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run", [RUN])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: expected a JSON object with a kind"):
        read_run(run)


def test_a_run_with_only_popularity_is_shown(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", [RUN, EVALUATIONS[-1]])))
    assert "0.0220" in page.text and "times popularity" not in page.text


def test_report_needs_a_run_and_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [RUN])
    assert main(["report", "--output", "x.html"]) == 2
    assert main(["report", str(run), str(run)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no run given: expected --run DIR (see `mme report --help`)",
        "error: several runs: expected --output FILE for the combined report",
    ]
    assert main(["report", str(run), "--run", str(run), "--output", str(tmp_path / "both.html")]) == 0
    assert main(["report", str(run)]) == 0 and (run / "report.html").is_file()
