"""`--dry-run` of every launcher command prints, starts nothing, writes nothing and imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.command_line import CONFIG, REPOSITORY

COMMANDS = {
    "run": (["--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29413"], "-m mme train --config"),
    "slurm": (["--nnodes", "2"], "#SBATCH --nodes=2"),
    "kubernetes": (["--nnodes", "2"], "kind: JobSet"),
    "preflight": (["data.path=nowhere"], "-m launcher.group_check runs"),
    "plan": (["--items", "1000000"], "Peak memory of the fullest rank"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run(command: str, tmp_path: Path) -> None:
    options, printed = COMMANDS[command]
    arguments = [command, "--config", str(REPOSITORY / CONFIG), *options, "--dry-run"]
    code = (
        f"import sys, launcher.__main__ as m; status = m.main({arguments!r}); "
        "print(sorted({'torch', 'pyarrow', 'numpy', 'deepspeed'} & set(sys.modules))); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert list(tmp_path.iterdir()) == []
