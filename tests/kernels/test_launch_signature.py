"""`kernels.aot` compiles the same as a launch: types, constants, alignment and launch options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "operation, expected", [("attention", 12), ("experts", 14), ("softmax", 13), ("elementwise", 10)]
)
def test_a_launch_compiles_what_aot_compiles(operation: str, expected: int) -> None:
    """Nothing is compiled in the middle of training, whether or not the number of tokens is a multiple of 16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.launches", operation]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["launched"]) == set(found["compiled"])
    assert len(set(found["compiled"])) == expected
