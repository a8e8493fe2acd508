"""The suite for one GPU runs every stage, writes each figure to disk at once, and loses only a figure that fails."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.gpu_suite.correctness import compare
from benchmarks.gpu_suite.results import DEVICE_LOST, Recorder, Results

driver = importlib.import_module("benchmarks.gpu_suite.__main__")


def fail(message: str) -> dict[str, Any]:
    raise RuntimeError(message)


def test_a_failure_is_recorded_and_passed_over(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 1, "rates")
    recorder.figure("first", lambda: fail("no memory\nand more"))
    recorder.rows("second", lambda: [{"ms": 1.0 / 3}, {"ms": 2.0}])
    first, *second = Results(tmp_path).lines()
    assert first["failed"] == "RuntimeError: no memory" and recorder.failures == 1
    assert [row["ms"] for row in second] == [0.33333, 2.0]


def test_a_later_run_measures_what_is_missing(tmp_path: Path) -> None:
    first = Recorder(tmp_path, 1, "rates")
    first.figure("known", lambda: {"ms": 1.0})
    first.figure("failed", lambda: fail("no"))
    Recorder(tmp_path, 1, "rates").figure("failed", lambda: {"ms": 2.0})  # not again in the same run
    second = Recorder(tmp_path, 2, "rates")
    second.figure("known", lambda: fail("measured again"))
    second.figure("failed", lambda: {"ms": 3.0})
    assert [line.get("ms") for line in Results(tmp_path).lines()] == [1.0, None, 3.0]
    assert second.recorded("rates", "failed")["ms"] == 3.0
    assert second.recorded("rates", "unknown") == {}


def test_a_line_cut_off_by_an_end_is_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append({"run": 1})
    with results.path.open("a") as file:
        file.write('{"run": 1, "stage": "rat')
    results.append({"run": 2})
    assert results.lines() == [{"run": 1}, {"run": 2}] and results.runs() == 2


def test_a_lost_gpu_ends_the_process_and_the_next_one_goes_on_behind_the_figure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        Recorder(tmp_path, 1, "attention").figure("bad", lambda: fail("CUDA error: an illegal memory access"))
    assert ended.value.code == DEVICE_LOST
    following = Recorder(tmp_path, 1, "attention")
    following.figure("bad", lambda: fail("measured again"))
    following.figure("good", lambda: {"ms": 1.0})
    assert [line["figure"] for line in Results(tmp_path).lines()] == ["bad", "good"] and following.failures == 1


def test_a_stage_out_of_time_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "STAGES", {"rates": 0.01, "no such stage": 60})
    with pytest.raises(typer.Exit):
        driver.main(out=tmp_path, only="", seconds=None, dry=True)
    _, first, second = Results(tmp_path).lines()
    assert (first["stage"], first["status"]) == ("rates", "out of time")
    assert (second["status"], second["exit"]) == ("failed", 1) and "KeyError" in (tmp_path / second["log"]).read_text()


def test_no_stage_begins_after_the_time_for_all(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit):
        driver.main(out=tmp_path, only="rates", seconds=1.0, dry=True)
    assert Results(tmp_path).lines()[1]["status"] == "not begun"


@pytest.mark.parametrize(
    "options, expected",
    [
        pytest.param({"only": "rates,rate"}, "--only rate: expected some of environment", id="unknown stage"),
        pytest.param({"out": None}, "no folder for the results: give --out or set OUT", id="no folder"),
        pytest.param({"dry": False}, "no CUDA GPU answers: --dry runs all stages on a CPU", id="no GPU"),
    ],
)
def test_bad_input_is_refused(
    options: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(driver, "_gpu_answers", lambda: False)
    with pytest.raises(typer.Exit) as refused:
        driver.main(**{"out": tmp_path, "only": "", "seconds": None, "dry": True} | options)
    assert refused.value.exit_code == 2 and expected in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


def test_results_of_a_dry_run_and_of_a_gpu_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results(tmp_path).append({"run": 1, "dry": False})
    with pytest.raises(typer.Exit):
        driver.main(out=tmp_path, only="rates", seconds=None, dry=True)
    assert "holds results of a GPU" in capsys.readouterr().err


def test_a_wrong_kernel_is_found() -> None:
    def form(factor: float, backend: str, x: torch.Tensor) -> list[torch.Tensor]:
        return [x * (factor if backend == "triton" else 2.0)]

    x = [torch.randn(7)]
    assert compare(lambda *given: form(2.0, *given), x)["same_bits"]
    with pytest.raises(ArithmeticError, match=r"results \[0, 1\] of 2 are wrong"):
        compare(lambda *given: form(2.01, *given), x)
    draws = iter([2.0, 2.0 + 1e-6])
    with pytest.raises(ArithmeticError, match="two runs differ"):
        compare(lambda backend, y: [y * (next(draws) if backend == "triton" else 2.0)], x)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_stage_runs_dry_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert done.returncode == 0, done.stdout + done.stderr + logs
    lines = Results(tmp_path).lines()
    assert {line["stage"] for line in lines if line.get("status") == "done"} == set(driver.STAGES)
    assert not [line for line in lines if "failed" in line]
    figures = {(line["stage"], line["figure"]) for line in lines if "figure" in line}
    assert {stage for stage, _ in figures} == set(driver.STAGES)
    kernels = {line["kernel"] for line in lines if line.get("figure") == "1x64, N=40, kernels alone"}
    assert {"semantic_forward_kernel", "bias_value_kernel", "position_gradient_kernel"} <= kernels
    training = next(line for line in lines if line.get("figure") == "training")
    assert training["tokens_per_s"] > 0 and training["peak_mem_gib"] > 0 and "attention" in training["percent"]
    again = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert again.stdout.count("done in an earlier run") == len(driver.STAGES)
    assert len(Results(tmp_path).lines()) == len(lines) + 1
    assert json.loads(Results(tmp_path).path.read_text().splitlines()[-1])["run"] == 2
