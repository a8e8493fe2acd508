"""Counts the instructions of the attention's product loops in the machine code of sm_90.

The counts are exact, so that no change brings repeated work back. Each limit leaves a few instructions for another version of the
compiler.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

FORWARD = ("semantic_forward_kernel", "bias_forward_kernel")
BACKWARD = (
    "semantic_query_kernel",
    "semantic_key_kernel",
    "bias_value_kernel",
    "time_gradient_kernel",
    "position_gradient_kernel",
)


@functools.cache
def rows(groups: int, width: int) -> dict[str, dict[str, Any]]:
    """The report of `kernels.aot` on the bfloat16 variant of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    name = f"({'|'.join(FORWARD + BACKWARD)}) bf16 G={groups} dqk={width} dv={width}$"
    command = [sys.executable, "-m", "kernels.aot", "--arch", "90", "--only", name]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row["kernel"]: row for row in json.loads(done.stdout)}


def total(groups: int, width: int, kernels: tuple[str, ...], shortest: bool = False) -> float:
    """Instructions per (query, key) pair of all groups; the semantic kernels run once per group."""
    found = 0.0
    for kernel in kernels:
        row = rows(groups, width)[kernel]
        # The shortest path of d w_ts is that of a tile of one bucket, which it does not process.
        count = row["shortest_path"] if shortest and kernel.startswith("bias") else row
        found += count["instructions_per_pair"] * (groups if kernel.startswith("semantic") else 1)
    return found


@pytest.mark.parametrize("groups, width", [(1, 64), (4, 16), (1, 128)])
def test_no_spill_and_no_product_twice(groups: int, width: int) -> None:
    for kernel in FORWARD + BACKWARD:
        row = rows(groups, width)[kernel]
        assert row["spill_bytes"] == 0, kernel
        assert row["tensor_repetition"] == 1, kernel


@pytest.mark.parametrize("groups, width, several, two", [(1, 64, 20, 13), (4, 16, 30, 23), (1, 128, 22, 15)])
def test_forward(groups: int, width: int, several: float, two: float) -> None:
    """Tiles of several time buckets, and of one or two."""
    assert total(groups, width, FORWARD) <= several
    assert total(groups, width, FORWARD, shortest=True) <= two


@pytest.mark.parametrize("groups, width, several, two", [(1, 64, 53, 47), (1, 128, 68, 61)])
def test_backward(groups: int, width: int, several: float, two: float) -> None:
    assert total(groups, width, BACKWARD) <= several
    assert total(groups, width, BACKWARD, shortest=True) <= two
