"""Counts the instructions per pair in the product loops of the expert FFN and of sampled softmax, as compiled for sm_90.

The counts are exact: they change with the code and with Triton, not with the machine. Two warps that compute the same, or a longer
form of a function, give a higher count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

EXPERTS = {"forward_kernel": 9.6, "backward_rows_kernel": 24, "backward_weights_kernel": 40}
SOFTMAX = {"forward_shared_kernel": 12.25, "backward_hidden_shared_kernel": 9.25, "backward_negatives_kernel": 10.25}


def compiled(only: str, path: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "kernels.aot", "--arch", "90", "--only", only, "--json", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2], capture_output=True)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "limits, variant",
    [
        pytest.param(EXPERTS, "bf16 d=128 top_k=2", id="experts"),
        pytest.param(SOFTMAX, "sampled softmax bf16 D=64 ieee g=64", id="softmax"),
    ],
)
def test_counts(limits: dict[str, float], variant: str, tmp_path: Path) -> None:
    rows = compiled(f"^({'|'.join(limits)}) {variant}$", tmp_path / "aot.json")
    assert {row["kernel"] for row in rows} == set(limits)
    for row in rows:
        assert row["instructions_per_pair"] <= limits[row["kernel"]], row
        assert row["tensor_repetition"] == 1.0, row
        assert row["spill_bytes"] == 0, row
