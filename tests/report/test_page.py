"""The report of a run, made from the files in its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mme.errors import UserError
from mme.report.page import write_compared_report, write_report
from tests.report.pages import EVALUATIONS, EXPERTS, RUN, Page, evaluation, learned, train_records, write_run

ROOT = Path(__file__).resolve().parents[2]


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
    assert path == run / "report.html" and [file.name for file in run.glob("report*")] == ["report.html"]
    assert page.loads == [] and "url(" not in page.style
    assert "first <run>" in page.text
    for text in ["0.1100", "0.0220", "5.0×", "0.4321", "leave_two_out", "stable by time", "0123abcd", "1,234 users"]:
        assert text in page.text, text
    assert "Expert 2 of block 1 is starved: it gets 0.10% of the tokens" in page.text
    assert "3,000" in page.text and "75.0%" in page.text and "4,000" in page.text
    assert "2.13.0" in page.text and "lr: 0.004" in page.text
    assert "torchrun --nproc-per-node 2 -m mme train" in page.text
    assert "The dashed line marks the chosen checkpoint, step 200." in page.text
    assert len(page.charts) == 8  # loss, two of validation, throughput, waiting; load, evenness, entropy
    assert {"recorded steps", "smoothed", "fuxi-mme", "popularity", "block 1"} <= page.series()
    assert "0:10" in page.text  # 200 steps of 50 ms


def test_missing_figures_are_left_out(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", train_records()[:1])))
    assert "The run has no evaluation" in page.text
    assert len(page.charts) == 3
    assert "Experts" not in page.text and "Parameters" not in page.text and "Results" not in page.text


def test_run_without_validation_shows_its_test_metrics_and_no_chosen_checkpoint(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", [RUN, *train_records(), *EVALUATIONS[4:]])))
    assert "0.1100" in page.text and "on the test split" in page.text
    assert "chosen checkpoint" not in page.text


def test_a_run_interrupted_before_its_test_shows_validation(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", [RUN, *train_records(), *EVALUATIONS[:4]])))
    assert "0.1200" in page.text and "on the validation split" in page.text


def test_a_truncated_line_does_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", train_records())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "mod')
    assert "Training loss" in Page(write_report(run)).text


def test_an_expert_that_gets_all_tokens_is_named(tmp_path: Path) -> None:
    load = [[[0.02, 0.5, 0.48], [0.04, 0.42, 0.54]], [[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]]]
    records = [RUN, {"kind": "experts", "step": 1, "blocks": [0, 1], "load": load}]
    page = Page(write_report(write_run(tmp_path / "run", records, "model.moe.num_experts=3")))
    assert "Expert 1 of block 0 gets nearly all tokens: 46.0% of at most 50%" in page.text
    assert "Expert 2 of block 0 gets nearly all tokens: 51.0%" in page.text
    assert page.text.count("gets nearly all") == 2 and "starved: it gets 3.00%" in page.text


def test_what_the_model_learned_is_shown(tmp_path: Path) -> None:
    record = evaluation("fuxi-mme", "test", 200, 0.11, insight=learned() | {"longest_gap_s": 86_400})
    page = Page(write_report(write_run(tmp_path / "run", [*train_records(), record])))
    for text in [
        "What the model learned",
        "Effective rank of the tables, at most 2: 1.9, 1.0",
        "3,000 histories",
        "all views0.1900",
        "view 1 alone0.1750",
        "<i>504,3217 0.91 · 9 0.50",
    ]:
        assert text in page.text.replace("\n", ""), text
    cells = [row for spec in page.charts for row in spec["data"]["values"] if "row" in row]
    assert {"row": "view 0", "column": "view 1", "share": 0.125, "text": "12.5"} in cells
    assert {"row": "block 1, <c>", "column": "expert 0", "share": 0.25, "text": "25.0"} in cells
    plain = evaluation("fuxi-mme", "test", 200, 0.11)
    without = Page(write_report(write_run(tmp_path / "other", [*train_records(), plain])))
    assert "What the model learned" not in without.text
    assert len(page.charts) == len(without.charts) + 7  # spectra, time, position, similarity, routing three times


def test_time_weights_end_at_the_longest_time_between_events(tmp_path: Path) -> None:
    record = evaluation("fuxi-mme", "test", 200, 0.11, insight=learned() | {"longest_gap_s": 86_400})
    page = Page(write_report(write_run(tmp_path / "run", [*train_records(), record])))
    (spec,) = [spec for spec in page.charts if "time between events, s" in json.dumps(spec)]
    xs = [row["x"] for row in spec["data"]["values"]]
    assert min(xs) == 1 and 86_400 / 1.36 < max(xs) <= 86_400  # each bucket is 1.35 times as long as the previous one


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({}, "Items of the user's history are not ranked, except for the target."),
        ({"seen": "exclude"}, "so a target among them is a miss."),
        ({"seen": "include"}, "All items of the catalogue are ranked."),
    ],
)
def test_report_says_what_was_ranked(tmp_path: Path, more: dict[str, str], sentence: str) -> None:
    record = evaluation("fuxi-mme", "test", 200, 0.11, **more)
    assert sentence in Page(write_report(write_run(tmp_path / "run", [record]))).text


def test_many_repeated_targets_give_a_warning_if_they_count_as_misses(tmp_path: Path) -> None:
    record = evaluation("fuxi-mme", "test", 200, 0.11, seen="exclude", repeated_targets=0.24)
    page = Page(write_report(write_run(tmp_path / "excluded", [record])))
    assert "24.0% of the test targets are items" in page.text and "eval.seen=include ranks them" in page.text
    page = Page(write_report(write_run(tmp_path / "included", [record | {"seen": "include"}])))
    assert "Warnings" not in page.text and "24.00% of the targets are items" in page.text


def test_a_run_below_popularity_gives_the_first_warning(tmp_path: Path) -> None:
    records = [RUN, EXPERTS, evaluation("hstu", "test", 20, 0.01), evaluation("popularity", "test", 20, 0.022)]
    page = Page(write_report(write_run(tmp_path / "run", records)))
    warnings = page.text[page.text.index("Warnings") + len("Warnings") :].strip()
    assert warnings.startswith("hstu is worse than popularity: test NDCG@10 0.0100, popularity 0.0220.")


def test_confidence_intervals_are_in_the_table_and_around_the_curves(tmp_path: Path) -> None:
    errors = {"standard_errors": {"ndcg@10": 0.01}}
    records = [record | errors for record in EVALUATIONS]
    page = Page(write_report(write_run(tmp_path / "run", records)))
    assert "0.1100 ± 0.0196" in page.text and "half a 95% confidence interval over users" in page.text
    rows = [row for spec in page.charts for row in spec["data"]["values"] if "low" in row]
    assert {(row["x"], row["low"], row["high"]) for row in rows if row["series"] == "fuxi-mme"} == {
        (100, 0.0804, 0.1196),
        (200, 0.1004, 0.1396),
    }


def test_memory_and_use_of_the_devices_are_shown(tmp_path: Path) -> None:
    train = [
        record
        | {"mfu": record["step"] / 1000, "peak_mem_gib": 12.0 + record["step"] / 100, "exposed_communication": 0.25}
        for record in train_records()
    ]
    run = write_run(tmp_path / "run", [RUN, *train])
    other = write_run(tmp_path / "other", [RUN, *train_records()])
    page = Page(write_report(run))
    assert "MFU, median11.0%" in page.text and "peak memory14 GiB" in page.text
    assert len(page.charts) == len(Page(write_report(other)).charts) + 3
    for title in ["Model FLOPs utilisation", "Peak memory of the fullest rank, GiB", "Exposed communication"]:
        assert title in page.text
    both = Page(write_compared_report([run, other], tmp_path / "both.html"))
    assert "Peak memory of the fullest rank, GiB" in both.text


def test_several_runs_are_shown_side_by_side(tmp_path: Path) -> None:
    def segments(ndcg: float) -> dict[str, Any]:
        return {"segments": {"popularity": [{"group": "new", "users": 20, "ndcg@10": ndcg, "standard_error": 0.01}]}}

    tested = EVALUATIONS[-2] | segments(0.05)
    first = write_run(tmp_path / "first", [RUN, *train_records(), *EVALUATIONS, tested], "train.lr=0.004")
    evaluations = [
        evaluation("fuxi-mme", "valid", 90, 0.2),
        evaluation("fuxi-mme", "test", 90, 0.1234, **segments(0.07)),
    ]
    second = write_run(tmp_path / "second", [RUN, *train_records(), *evaluations], "train.lr=0.002")
    path = write_compared_report([first, second], tmp_path / "both.html")
    page = Page(path)
    assert {"first", "second"} == page.series()
    assert "0.1100" in page.text and "0.1234" in page.text
    rings = {(row["series"], row["x"]) for spec in page.charts for row in spec["data"]["values"] if row.get("ring")}
    assert rings == {("first", 200), ("second", 90)}
    bars = [row for spec in page.charts for row in spec["data"]["values"] if row.get("group") == "new (20)"]
    assert [(row["series"], row["y"]) for row in bars] == [("first", 0.05), ("second", 0.07)]
    assert "<th>output_dir</th>" not in page.source
    rows = [line for line in page.source.splitlines() if "<th>train.lr</th>" in line]
    assert rows == ["<tr><th>train.lr</th><td>0.004</td><td>0.002</td></tr>"]
    assert "different targets" not in page.text
    other = write_run(tmp_path / "other", [evaluation("fuxi-mme", "test", 90, 0.1, targets_sha256="ffff")])
    assert "different targets" in Page(write_compared_report([first, other], path)).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: no such file"),
        ("", "metrics.jsonl: empty"),
        ('{"kind": "run", "step": 0}\n\x00\x00\n{"kind": "run"}\n', "metrics.jsonl: line 2: expected a JSON object"),
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


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nothing")


def test_an_output_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RUN])
    with pytest.raises(UserError, match="expected a file in an existing folder"):
        write_report(run, tmp_path / "nowhere" / "report.html")


def test_a_folder_in_place_of_the_report_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [RUN])
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"run/report.html: cannot be written: Is a directory$"):
        write_report(run)


def test_an_installed_package_has_templates_and_scripts(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {path.name for path in (tmp_path / "lib" / "mme" / "report").rglob("*") if path.is_file()}
    assert {path.name for path in (ROOT / "mme" / "report").rglob("*") if path.suffix != ".pyc"} - built <= {
        "assets",
        "templates",
        "__pycache__",
    }


def test_segments_and_example_users_are_shown(tmp_path: Path) -> None:
    rows = [
        {"group": "top 1%", "users": 30, "ndcg@10": 0.5, "standard_error": 0.1},
        {"group": "new", "users": 4, "ndcg@10": 0.25, "standard_error": 0.05},
    ]
    example = {"user": "u1", "history": ["a", "b"], "top": ["c", "d"], "target": "<e>", "rank": 7}
    more = {"segments": {"popularity": rows}, "examples": [example, example | {"user": "u2", "rank": None}]}
    record = evaluation("fuxi-mme", "test", 200, 0.11, **more)
    baseline = evaluation("popularity", "test", 200, 0.02, segments={"popularity": rows[:1]})
    page = Page(write_report(write_run(tmp_path / "run", [record, baseline])))
    (spec,) = page.charts
    assert [(row["group"], row["series"], row["y"], row["low"], row["high"]) for row in spec["data"]["values"]] == [
        ("top 1% (30)", "fuxi-mme", 0.5, 0.304, 0.696),
        ("new (4)", "fuxi-mme", 0.25, 0.152, 0.348),
        ("top 1% (30)", "popularity", 0.5, 0.304, 0.696),
    ]
    (first,) = [line for line in page.source.splitlines() if "<th>u1</th>" in line]
    assert first == "<tr><th>u1</th><td>a → b</td><td>c · d</td><td>&lt;e&gt;</td><td>7</td></tr>"
    assert "not ranked" in page.text
