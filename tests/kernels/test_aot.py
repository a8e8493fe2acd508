"""Kernels compile without a GPU, and the report has their resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_compiles_a_variant_for_both_gpus(tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    command = [sys.executable, "-m", "kernels.aot", "--arch", "80", "--arch", "90", "--json", str(report)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    subprocess.run([*command, "--only", "semantic_query.*bf16.*dqk=16"], check=True, env=environment, cwd=root)
    rows = json.loads(report.read_text())
    assert [row["arch"] for row in rows] == [80, 90]
    for row in rows:
        assert row["kernel"] == "semantic_query_kernel"
        assert row["spill_bytes"] == 0
        assert row["tensor_core"] > 0
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= 163 * 1024
        assert sum(row["by_pipe"].values()) == pytest.approx(row["instructions_per_pair"], abs=0.01)
        assert 0 < row["bound_share"] <= 1 and row["limited_by"] == "special_function"
