"""The set-up script and the pins: callers, invalid settings, and when the script does nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = "scripts/setup_environment.sh"


def run_script(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a temporary folder where pip can reach no index, so that tests install nothing."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / SCRIPT, folder / SCRIPT)
    shutil.copytree(REPOSITORY / "requirements", folder / "requirements", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "setup.py", folder)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_REQUIRE_VIRTUALENV": "1"}
    offline |= {"PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        ["bash", SCRIPT],
        cwd=folder,
        env={**os.environ, **offline, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_make_and_the_image_use_the_same_script() -> None:
    assert f'RUN TORCH_INDEX_URL="${{TORCH_INDEX_URL}}" {SCRIPT}\n' in (REPOSITORY / "Dockerfile").read_text()
    # Without the variables of a make that may be running these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    commands = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "test"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert commands[0] == SCRIPT
    assert " -m pytest " in commands[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MME_STACK": "tpu"}, "setup: MME_STACK=tpu: expected cpu or cuda"),
        ({"PYTHON": "/bin/false"}, "setup: PYTHON=/bin/false: expected CPython 3.10 to 3.13 with the venv module"),
    ],
)
def test_invalid_settings_are_rejected_in_one_line(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    done = run_script(tmp_path, **settings)
    assert done.returncode == 1
    assert done.stderr == message + "\n"
    assert not (tmp_path / ".venv").exists()


def installed_stamp(stack: str) -> str:
    command = "cat requirements/*.txt requirements/locked/*.txt setup.py scripts/setup_environment.sh | sha256sum | cut -d' ' -f1"
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return f"{stack} {done.stdout}"


def test_nothing_is_installed_until_a_pin_changes(tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv", with_pip=False)
    (tmp_path / ".venv" / "installed").write_text(installed_stamp("cpu"))
    (tmp_path / ".venv" / "stack").write_text("cpu\n")
    done = run_script(tmp_path, MME_STACK="cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # Another build needs a new environment, which /bin/false cannot create.
    done = run_script(tmp_path, MME_STACK="cuda", PYTHON="/bin/false")
    assert done.stderr.startswith("setup: PYTHON=/bin/false")
    # With other pins the environment is kept and pip is called, which does not exist.
    (tmp_path / ".venv" / "installed").write_text("cpu 0\n")
    done = run_script(tmp_path, MME_STACK="cpu")
    assert done.returncode == 1
    assert "setup: failed: .venv/bin/python -m pip" in done.stderr
    assert not (tmp_path / ".venv" / "installed").exists()


def test_packages_are_never_installed_outside_a_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_in = tmp_path / ".venv" / "bin" / "python"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -m ] && touch {tmp_path}/called\nexec {sys.executable} -S "$@"\n')
    stand_in.chmod(0o755)
    (tmp_path / ".venv" / "installed").write_text(installed_stamp("cpu"))
    done = run_script(tmp_path, MME_STACK="cpu", PYTHON="/bin/false")
    assert done.stderr.startswith("setup: PYTHON=/bin/false")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "requirements").glob("*.txt")), ids=lambda file: file.name)
def test_every_requirement_is_pinned_and_covers_every_python(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    markers: dict[str, list[str]] = {}
    for line in lines:
        pinned = re.fullmatch(r"([\w.-]+)==[\w.]+(?: ; python_version (< \"3\.11\"|>= \"3\.11\"))?", line)
        assert pinned, line
        markers.setdefault(pinned[1], []).append(pinned[2] or "all")
    only_old_pythons = {"exceptiongroup", "greenlet", "pytz", "tomli"}
    for name, found in markers.items():
        expected = [['< "3.11"']] if name in only_old_pythons else [["all"], ['< "3.11"', '>= "3.11"']]
        assert found in expected, name


def pins_of(file: Path) -> list[str]:
    lines = file.read_text().replace("\\\n", " ").splitlines()
    return [line.split(" --hash=")[0].strip() for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["build", "common", "dev", "cpu", "cuda"])
def test_every_pin_is_locked_with_the_hashes_of_its_files(name: str) -> None:
    requirements = REPOSITORY / "requirements"
    pins = [pin for pin in pins_of(requirements / f"{name}.txt") if not pin.startswith("torch==")]
    assert pins_of(requirements / "locked" / f"{name}.txt") == pins, "run scripts/lock_requirements.py"
    if name in ("cpu", "cuda"):
        torch = next(pin for pin in pins_of(requirements / f"{name}.txt") if pin.startswith("torch=="))
        assert torch in pins_of(requirements / "locked" / f"torch-{name}.txt"), "run scripts/lock_requirements.py"
    for file in (requirements / "locked").glob("*.txt"):
        lines = file.read_text().replace("\\\n", " ").splitlines()
        assert all(re.search(r" --hash=sha256:[0-9a-f]{64}", line) for line in lines if not line.startswith("#"))


def test_requirements_of_pinned_packages_are_pinned() -> None:
    requirements = REPOSITORY / "requirements"
    pinned = {canonicalize_name(pin.split("==")[0]) for file in requirements.rglob("*.txt") for pin in pins_of(file)}
    for name in pinned:
        try:
            required = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:  # it belongs to the other stack or another Python
            continue
        for each in required:
            if each.marker is None or each.marker.evaluate({"extra": ""}):
                assert canonicalize_name(each.name) in pinned, f"{name} requires {each}"


def test_a_pinned_package_runs_on_every_patch_level_that_setup_accepts() -> None:
    first = f"{sys.version_info.major}.{sys.version_info.minor}.0"
    for name in {pin.split("==")[0] for file in (REPOSITORY / "requirements").glob("*.txt") for pin in pins_of(file)}:
        try:
            needed = distribution(name).metadata.get("Requires-Python", "")
        except PackageNotFoundError:
            continue
        assert SpecifierSet(needed).contains(first), f"{name} needs Python {needed}"


def test_every_install_requires_hashes_except_torch_from_another_index() -> None:
    script = (REPOSITORY / SCRIPT).read_text()
    installs = [line for line in script.splitlines() if '"${pip[@]}" install' in line]
    without = [line for line in installs if "--require-hashes" not in line and "-e ." not in line]
    assert len(without) == 2 and all("torch" in line for line in without), without
    assert "--extra-index-url" not in script
