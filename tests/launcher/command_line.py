"""Runs the launcher in a separate process, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/quickstart.yaml"


def launch(*arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m launcher ARGUMENTS` in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The single error line of a rejected command."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
