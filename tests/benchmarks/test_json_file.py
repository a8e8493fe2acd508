"""Figures are written as JSON with one row per line and without loss, and raw figures are summarised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.aot_summary import summary
from benchmarks.json_file import to_json, write_json

REPOSITORY = Path(__file__).resolve().parents[2]
ROW = {"shape": "2 × 64", "tokens_per_s": [1.5, 2.25], "empty": [], "none": None, "text": "x" * 150}


@pytest.mark.parametrize(
    "value", [ROW, [ROW] * 3, {"rows": [ROW] * 3, "deep": {"rows": [[ROW, ROW], []]}}, 1.5, {}, []]
)
def test_json_is_read_back(value: object, tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "figures.json", value)
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == value


def test_each_row_is_one_line() -> None:
    assert to_json([ROW, ROW]).splitlines() == ["[", f" {to_json(ROW)},", f" {to_json(ROW)}", "]"]


def test_summary_of_compilations() -> None:
    def compiled(kernel: str, arch: int, registers: int, spilled: int = 0, tensor_core: int = 0) -> dict[str, object]:
        usage = {"registers": registers, "spill_bytes": spilled, "shared_bytes": 10 * registers}
        return {"kernel": kernel, "variant": "v", "arch": arch, "tensor_core": tensor_core, "triton": "3"} | usage

    found = summary([compiled("b", 80, 50), compiled("a", 90, 70, 8), compiled("b", 80, 20, tensor_core=4)])
    assert found["triton"] == ["3"]
    a, b = found["rows"]
    assert (a["kernel"], a["arch"], a["variants"], a["registers"], a["with_tensor_cores"]) == ("a", 90, 1, [70, 70], 0)
    assert (b["kernel"], b["variants"], b["registers"], b["shared_bytes"]) == ("b", 2, [20, 50], 500)
    assert b["with_tensor_cores"] == 1
    assert found["spilling"] == [{"kernel": "a", "variant": "v", "arch": 90, "spill_bytes": 8}]


def test_results_in_git_are_summaries() -> None:
    for path in (REPOSITORY / "benchmarks" / "results").glob("*.json"):
        assert path.read_text().count("\n") < 400, f"{path}: raw figures belong into benchmarks/raw"
