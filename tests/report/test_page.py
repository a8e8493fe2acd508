"""The report of a run, from the files that a run leaves."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mme.config import load_config, save_config
from mme.errors import UserError
from mme.report.charts import Line, line_chart, ticks
from mme.report.page import read_run, results_table, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects the text and what the page would load; fails on tags that don't match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.counts: dict[str, int] = {}
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [str(value) for name, value in attributes if name in {"src", "href", "data", "srcset"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(folder: Path, records: list[dict[str, Any]], *overrides: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    save_config(load_config(None, [f"data.path={data}", *overrides]), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def train_records() -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "epoch": 0,
            "loss": 7 - step / 100,
            "tokens_per_s": 1e4,
            "lr": 1e-3,
            "step_ms": 50.0,
            "wait_ms": 8.0,
            "straggler_ms": 3.0,
            "slowest_rank": 1,
        }
        for step in range(10, 210, 10)
    ]


def evaluation(model: str, split: str, step: int, ndcg: float) -> dict[str, Any]:
    figures = {"hr@10": 2 * ndcg, "hr@50": 3 * ndcg, "ndcg@10": ndcg, "ndcg@50": 1.5 * ndcg, "mrr": ndcg / 2}
    about = {"protocol": "leave_two_out", "sort_rule": "stable by time", "targets_sha256": "0123abcd", "users": 1234}
    return {"kind": "eval", "model": model, "split": split, "step": step, **about, **figures}


RUN = {
    "kind": "run",
    "step": 0,
    "time": "2025-01-02T03:04:05+0000",
    "device": "cpu",
    "world_size": 2,
    "parameters": {"tables": 3000, "decoder": 1000},
    "versions": {"torch": "2.13.0"},
}
EVALUATIONS = [
    evaluation("fuxi-mme", "valid", 100, 0.1),
    evaluation("popularity", "valid", 100, 0.03),
    evaluation("fuxi-mme", "valid", 200, 0.12),
    evaluation("popularity", "valid", 200, 0.03),
    evaluation("fuxi-mme", "test", 200, 0.11),
    evaluation("popularity", "test", 200, 0.022),
]
EXPERTS = {
    "kind": "experts",
    "step": 200,
    "blocks": [1],
    "load": [[[0.7, 0.299, 0.001]] * 4],
    "entropy": [[0.9, 0.8, 0.7, 0.6]],
}


def test_whole_report_is_self_contained_and_has_every_part(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "first <run>",
        [RUN, *train_records(), EXPERTS, *EVALUATIONS],
        "model.moe.placement=[1]",
        "train.lr=0.004",
    )
    (tmp_path / "data" / "dataset.json").write_text(
        json.dumps({"num_users": 1234, "oracle": {"test": {"hr@10": 0.4321}}})
    )
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    assert page.loads == [] and "script" not in page.counts and "url(" not in path.read_text()
    assert "first <run>" in page.text
    for text in ["0.1100", "0.0220", "5.0×", "0.4321", "leave_two_out", "stable by time", "0123abcd", "1,234 users"]:
        assert text in page.text, text
    assert "Expert 2 of block 1 is starved: it gets 0.10% of the tokens" in page.text
    assert "block 1, view 3" in page.text and "70.0" in page.text
    assert "3,000" in page.text and "75.0%" in page.text and "4,000" in page.text
    assert "2.13.0" in page.text and "lr: 0.004" in page.text
    assert "torchrun --nproc-per-node 2 -m mme train" in page.text
    assert page.counts["svg"] == 7  # loss, two of validation, throughput, waiting, evenness, entropy
    assert "0:10" in page.text  # 200 steps of 50 ms


def test_what_was_not_recorded_is_left_out(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", train_records()[:1])))
    assert "No evaluation was recorded" in page.text
    assert page.counts["svg"] == 3
    assert "Experts" not in page.text and "Parameters" not in page.text and "Results" not in page.text


def test_run_without_validation_shows_its_test_metrics(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", [RUN, *train_records(), *EVALUATIONS[4:]])))
    assert "0.1100" in page.text and "on the test split" in page.text


def test_run_cut_off_before_its_test_shows_validation(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", [RUN, *train_records(), *EVALUATIONS[:4]])))
    assert "0.1200" in page.text and "on the validation split" in page.text


def test_line_cut_off_by_a_crash_does_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", train_records())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "mod')
    assert "Training loss" in Page(write_report(run)).text


def test_table_for_the_terminal_has_lift_and_oracle(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RUN, *EVALUATIONS])
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"oracle": {"test": {"hr@10": 0.4321}}}))
    console = Console(file=io.StringIO(), width=120)
    table = results_table(read_run(run))
    assert table is not None
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "test metrics at step 200" in text
    assert [line.split()[1] for line in text.splitlines() if "│" in line] == [
        "fuxi-mme",
        "popularity",
        "times",
        "oracle",
    ]
    assert "5.0×" in text and "0.4321" in text


def test_expert_that_takes_all_is_named(tmp_path: Path) -> None:
    load = [[[0.02, 0.5, 0.48], [0.04, 0.42, 0.54]], [[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]]]
    records = [RUN, {"kind": "experts", "step": 1, "blocks": [0, 1], "load": load}]
    page = Page(write_report(write_run(tmp_path / "run", records, "model.moe.num_experts=3")))
    assert "Expert 1 of block 0 takes nearly all: 46.0% of the tokens, of 50% possible" in page.text
    assert "Expert 2 of block 0 takes nearly all: 51.0%" in page.text
    assert page.text.count("takes nearly all") == 2 and "starved: it gets 3.00%" in page.text


def test_no_results_no_table(tmp_path: Path) -> None:
    assert results_table(read_run(write_run(tmp_path / "run", train_records()))) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: no such file"),
        ("", "metrics.jsonl: empty"),
        ('{"kind": "run", "step": 0}\n\x00\x00\n{"kind": "run"}\n', "metrics.jsonl: line 2: expected a JSON object"),
        ('{"kind": "train", "step": "ten"}\n', "metrics.jsonl: line 1: step: expected a number, found 'ten'"),
        ('{"kind": "experts", "step": 1, "load": 3}\n', "metrics.jsonl: line 1: load: expected lists of shares"),
    ],
)
def test_missing_or_damaged_metrics_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    run = write_run(tmp_path / "run", [])
    path = run / "metrics.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        write_report(run)
    assert message in str(caught.value)
    assert not (run / "report.html").exists()


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nothing")


def test_chart_places_points_and_scales_by_round_ticks() -> None:
    chart = line_chart([Line("loss", [(0, 0.0), (100, 1.0)])], title="a < b")
    assert 'points="58.0,226.0 538.0,12.0"' in chart
    assert "a &lt; b" in chart
    assert line_chart([Line("nothing", [])], title="") == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3.1, 7.2, [3, 4, 5, 6, 7, 8]), (5, 5, [5, 6, 7, 8, 9, 10])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_what_the_model_learned_is_shown(tmp_path: Path) -> None:
    share = [[[0.25, 0.75]] * 3]
    groups = {"groups": ["a", "b", "<c>"], "share": share}
    learned = {
        "singular_values": [[4.0, 2.0], [3.0, 0.0]],
        "effective_rank": [1.89, 1.0],
        "similarity": [[1.0, 0.125], [0.125, 1.0]],
        "ranking": {"users": 3000, "all_views": 0.19, "ndcg@10": [0.18, 0.175]},
        "routing": {"blocks": [1], "view": groups, "popularity": groups, "position": groups},
        "time_weights": [[0.5, 0.25]],
        "position_weights": [[0.5, 0.25]],
    }
    record = evaluation("fuxi-mme", "test", 200, 0.11) | {"insight": learned}
    page = Page(write_report(write_run(tmp_path / "run", [*train_records(), record])))
    for text in [
        "What the model learned",
        "Effective rank of the tables, of 2 possible: 1.9, 1.0",
        "3,000 histories",
        "By all views 0.1900, by view 0 alone 0.1800, by view 1 alone 0.1750.",
        "12.5",
        "block 1, <c>",
    ]:
        assert text in page.text
    plain = evaluation("fuxi-mme", "test", 200, 0.11)
    without = Page(write_report(write_run(tmp_path / "other", [*train_records(), plain])))
    assert "What the model learned" not in without.text
    assert page.counts["svg"] == without.counts["svg"] + 3
