"""`benchmarks.scaling`: its predictions equal those of `plan`, and its efficiencies follow from its rates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from benchmarks.scaling import _efficiency, _largest_from, main
from launcher.plan import choice, layouts
from launcher.shape import Shape
from mme.config import load_config
from mme.devices import DEVICES
from tests.launcher.command_line import REPOSITORY


def test_predictions_are_those_of_the_plan(tmp_path: Path) -> None:
    file, overrides = tmp_path / "scaling.json", ["model.num_blocks=6"]
    brief = tmp_path / "summary.json"
    files = ["--json", str(file), "--summary", str(brief)]
    command = [sys.executable, "-m", "benchmarks.scaling", "--no-measure", *files, *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "predicted, not measured: h100-80g, growing work" in done.stdout
    predicted = json.loads(file.read_text())["predicted"]
    assert predicted["items"] == 32_038_725
    growing_a100, fixed_a100, growing_h100, _ = predicted["runs"]
    config = load_config(REPOSITORY / "configs/kuairand-27k.yaml", overrides)
    for run, kind in ((growing_a100, "a100-80g"), (growing_h100, "h100-80g")):
        assert [row["gpus"] for row in run["rows"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
        for row in run["rows"]:
            planned = choice(layouts(Shape(config, row["gpus"], 8, 32_038_725), DEVICES[kind]), None, DEVICES[kind])
            assert row["step_ms"] == pytest.approx(1e3 * planned.step_s)
            assert sum(part["ms"] for part in row["parts"].values()) == pytest.approx(row["step_ms"])
        assert run["rows"][0]["efficiency"] == 1
    # A batch of 8 × 64 sequences cannot be divided among 1,024 GPUs.
    assert [row["gpus"] for row in fixed_a100["rows"]] == [8, 16, 32, 64, 128, 256, 512]
    assert {row["gpus"] * row["tokens_per_gpu"] for row in fixed_a100["rows"]} == {8 * 65_536}
    summary = json.loads(brief.read_text())["predicted"]["runs"]
    for run, short in zip(predicted["runs"], summary, strict=True):
        assert (short["gpu"], short["work"]) == (run["gpu"]["name"], run["work"])
        assert [row["step_ms"] for row in short["rows"]] == pytest.approx(
            [row["step_ms"] for row in run["rows"]], abs=1e-3
        )
        assert short["rows"][0]["parts_ms"].keys() == run["rows"][0]["parts"].keys()


def test_another_configuration_uses_the_items_of_its_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "scaling.json", REPOSITORY / "configs/ml-1m.yaml"

    def predict(items: int | None = None) -> int:
        main(measure=False, config=config, items=items, overrides=[f"data.path={tmp_path}"], output=file)
        found: int = json.loads(file.read_text())["predicted"]["items"]
        return found

    with pytest.raises(typer.Exit) as refused:
        predict()
    assert refused.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("give --items N")
    (tmp_path / "dataset.json").write_text('{"num_items": 3706}')
    assert predict() == 3706
    assert predict(items=5000) == 5000


def test_a_part_counts_as_largest_from_the_first_size_at_which_it_is() -> None:
    def row(gpus: int, **ms: float) -> dict[str, object]:
        return {"gpus": gpus, "parts": {name: {"ms": value} for name, value in ms.items()}}

    rows = [
        row(8, host=9, attention=5, exchange=1),
        row(16, host=9, attention=5, exchange=6),
        row(32, host=9, exchange=10),
    ]
    assert _largest_from(rows) == {"host": 8, "attention": None, "exchange": 32}
    assert _largest_from(rows, beside="host") == {"host": None, "attention": 8, "exchange": 16}


def test_efficiency_compares_the_rate_per_process_with_a_single_process() -> None:
    runs = [
        {"processes": n, "sequences": 64, "tokens_per_s_all": [rate] * 3, "tokens_per_cpu_s_all": [rate / n] * 3}
        for n, rate in ((4, 200.0), (1, 100.0))
    ]
    one, four = _efficiency(runs, lambda run: True)
    assert (one["efficiency"], four["speed_up"], four["efficiency"]) == (1, 2, 0.5)
    assert four["efficiency_of_cpu_time"] == 0.5
