"""`make bench` runs benchmarks without arguments, and `make train` names data sets and runs."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
QUICKSTART = "configs/quickstart.yaml"


def test_every_benchmark_of_make_runs_without_arguments() -> None:
    # Without the variables of a make that may be running these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "BENCHMARKS"))}
    command = ["make", "--dry-run", "--no-print-directory", "bench"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    (names,) = re.findall(r"for name in ([\w ]+);", done.stdout)
    assert {"attention", "prepare", "train_throughput"} <= set(names.split())
    for name in names.split():
        main = importlib.import_module(f"benchmarks.{name}").main
        assert all(
            option.default is not inspect.Parameter.empty for option in inspect.signature(main).parameters.values()
        )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The script in a temporary project, whose interpreter records its arguments and creates an empty set."""
    project = tmp_path / "project"
    for folder in ("scripts", ".venv/bin", "configs", "mme/data", "mme/prepare"):
        (project / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "train.sh", project / "scripts")
    shutil.copy(REPOSITORY / QUICKSTART, project / QUICKSTART)
    (project / "configs" / "other.yaml").touch()
    (project / "mme" / "data" / "parts.py").touch()
    (project / "mme" / "prepare" / "reader.py").touch()
    stand_in = project / ".venv" / "bin" / "python"
    stand_in.write_text(
        '#!/bin/sh\necho "$@"\n[ "$3" = prepare ] || exit 0\n'
        'for last; do :; done\nmkdir -p "$last" && touch "$last/dataset.json"\n'
    )
    stand_in.chmod(0o755)
    return project


def run_script(project: Path, config: str, data: str | Path = "", *overrides: str) -> list[str]:
    command = ["scripts/train.sh", config, str(data), *overrides]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def name_of(launched: str) -> str:
    found = re.search(r"data\.path=datasets/(\S+) output_dir=runs/(\S+)", launched)
    assert found and found[1] == found[2], launched
    return found[1]


def test_only_the_quick_start_gets_the_embedded_set(project: Path) -> None:
    prepare = "-m mme prepare --synthetic quickstart --output datasets/quickstart"
    launch = f"-m launcher run --config {QUICKSTART} data.path=datasets/quickstart train.steps=1"
    assert run_script(project, QUICKSTART, "", "train.steps=1") == [prepare, launch]
    assert run_script(project, QUICKSTART, "", "train.steps=1") == [launch]
    (other,) = run_script(project, "configs/other.yaml", "", "train.steps=1")
    assert other == "-m launcher run --config configs/other.yaml train.steps=1"


def test_no_two_files_share_a_set_or_a_run(project: Path) -> None:
    files = ["ml-1m/ratings.dat", "ml-1m/ratings.csv", "ml-20m/ratings.csv", "copy/ml-20m/ratings.csv", "a b/quickstart.csv"]  # fmt: skip
    names = []
    for file in files:
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).write_text("1::2::3::4\n")
        prepared, launched = run_script(project, "configs/other.yaml", file)
        names.append(name_of(launched))
        assert prepared == f"-m mme prepare --input {file} --output datasets/{names[-1]}"
    assert len(set(names)) == len(files)
    readable = ["ml-1m-ratings", "ml-1m-ratings", "ml-20m-ratings", "ml-20m-ratings", "a-b-quickstart"]
    assert [re.sub(r"-[0-9a-f]{6}$", "", name) for name in names] == readable


def test_a_changed_file_in_a_folder_is_noticed(project: Path) -> None:
    logs = project / "logs.d" / "days"
    logs.mkdir(parents=True)
    (logs / "1.csv").write_text("user,item,time\n")
    prepared, launched = run_script(project, QUICKSTART, logs)
    assert name_of(launched).startswith("logs.d-days-")
    assert run_script(project, QUICKSTART, logs) == [launched]
    (logs / "1.csv").write_text("user,item,time\n1,2,3\n")
    assert run_script(project, QUICKSTART, logs) == [prepared, launched]
    (logs / "2.csv").write_text("user,item,time\n")
    assert run_script(project, QUICKSTART, logs) == [prepared, launched]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.csv", "error: DATA=none.csv: no such file, expected interactions\n"),
        ("empty.csv", "error: DATA=empty.csv: empty file, expected interactions\n"),
        ("pipe", "error: DATA=pipe: not a regular file or folder, expected interactions\n"),
        (
            "s3://bucket/log",
            "error: DATA=s3://bucket/log: a path with a scheme is not supported, expected interactions\n",
        ),
    ],
)
def test_unreadable_data_is_rejected_in_one_line(project: Path, data: str, message: str) -> None:
    (project / "empty.csv").touch()
    os.mkfifo(project / "pipe")
    command = ["scripts/train.sh", QUICKSTART, data]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("in_environment", [False, True])
def test_nothing_in_a_name_is_expanded(project: Path, in_environment: bool) -> None:
    shutil.copy(REPOSITORY / "Makefile", project)
    setup = project / "scripts" / "setup_environment.sh"
    setup.write_text("#!/bin/sh\n")
    setup.chmod(0o755)
    name = "$HOME $(touch made) `touch made` $(shell touch made) \"a\" 'b'.csv"
    (project / name).write_text("1::2::3::4\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    arguments = [] if in_environment else [f"DATA={name}"]
    done = subprocess.run(
        ["make", "--no-print-directory", "train", *arguments],
        cwd=project,
        env={**environment, "DATA": name} if in_environment else environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"-m mme prepare --input {name} --output datasets/")
    assert not (project / "made").exists()
