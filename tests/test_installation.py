"""An installed package finds its files outside a checkout, and names missing packages.

`scripts/check_wheel.sh`, which `.ci/run` calls, tests a wheel in a clean environment.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mme import __version__
from mme.config import load_config
from mme.errors import UserError
from mme.installation import prepare_training
from mme.shipped import own_or_shipped, shipped

REPOSITORY = Path(__file__).resolve().parents[1]


def test_a_shipped_configuration_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart.yaml").model.num_tables == 2
    assert own_or_shipped(Path("configs/nothing.yaml")) == Path("configs/nothing.yaml")
    assert own_or_shipped(Path("configs/../setup.py")) == Path("configs/../setup.py")
    own = tmp_path / "configs" / "quickstart.yaml"
    own.parent.mkdir()
    own.write_text(shipped("configs/quickstart.yaml").read_text().replace("num_tables: 2", "num_tables: 4"))
    assert load_config("configs/quickstart.yaml").model.num_tables == 4


def test_missing_training_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchrec" else find(name))
    with pytest.raises(
        UserError, match=r"^training and evaluation need torchrec, not installed: .*pip install 'mme\[cuda\]'"
    ):
        prepare_training()


def test_version_and_import_without_heavy_packages() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    heavy = "import mme, sys; print(sorted({'torch', 'pyarrow', 'torchrec', 'deepspeed'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", heavy], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    done = subprocess.run(
        [sys.executable, "-m", "mme", "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mme {__version__}\n"
