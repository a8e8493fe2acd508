"""The results in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mme.cli import _print_results as print_results
from mme.report.results import below_popularity, read_run, results_table
from tests.report.pages import EVALUATIONS, RUN, evaluation, train_records, write_run


def test_table_for_the_terminal_has_lift_and_oracle(tmp_path: Path) -> None:
    errors = {"standard_errors": {"ndcg@10": 0.01}}
    run = write_run(tmp_path / "run", [RUN, *(record | errors for record in EVALUATIONS)])
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"oracle": {"test": {"hr@10": 0.4321}}}))
    console = Console(file=io.StringIO(), width=80)
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


def test_no_results_no_table(tmp_path: Path) -> None:
    assert results_table(read_run(write_run(tmp_path / "run", train_records()))) is None


def test_below_popularity_uses_the_metric_that_selects_the_checkpoint(tmp_path: Path) -> None:
    baseline = evaluation("popularity", "test", 9, 0.05)
    for ndcg, is_below in ((0.049, True), (0.05, False), (0.3, False)):
        record = evaluation("fuxi-mme", "test", 9, ndcg) | {"hr@10": 0.9}
        run = read_run(write_run(tmp_path / "run", [record, baseline]))
        assert bool(below_popularity(run)) is is_below
    alone = read_run(write_run(tmp_path / "run", [evaluation("fuxi-mme", "test", 9, 0.01)]))
    assert below_popularity(alone) is None


def test_a_data_set_that_was_replaced_does_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RUN, *EVALUATIONS])
    for content in (
        '{"oracle": 3}',
        '{"oracle": {"test": [1]}}',
        '{"oracle": {"test": {"hr@10": "x"}}}',
        "[" * 100_000,
    ):
        (tmp_path / "data" / "dataset.json").write_text(content)
        assert read_run(run).oracle == {}


def test_training_ends_with_a_warning_if_the_model_is_below_popularity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = evaluation("popularity", "test", 9, 0.05)
    print_results(write_run(tmp_path / "bad", [RUN, evaluation("fuxi-mme", "test", 9, 0.02), baseline]))
    *_, warning, report = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: fuxi-mme is worse than popularity: test NDCG@10 0.0200, popularity 0.0500.")
    assert report == f"report: {tmp_path / 'bad' / 'report.html'}"
    print_results(write_run(tmp_path / "good", [RUN, evaluation("fuxi-mme", "test", 9, 0.06), baseline]))
    assert "warning" not in capsys.readouterr().out
