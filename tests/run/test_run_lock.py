"""A second job does not write into the folder of a run in progress."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mme.distributed.world import World
from mme.errors import UserError
from mme.run.run_lock import LOCK_FILE, only_job

HOLD = """
import sys, time
from pathlib import Path
from mme.files import take_lock
take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def world_of(rank: int = 0) -> World:
    return World(rank, 1, torch.device("cpu"), dist.HashStore())


@contextmanager
def held(run: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(run / LOCK_FILE), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_folder_in_use_is_refused_and_one_of_a_killed_job_is_not(tmp_path: Path) -> None:
    with held(tmp_path, 300) as holder:
        with (
            pytest.raises(UserError, match=r"output_dir .*: another job is training there"),
            only_job(tmp_path, world_of(), patience_s=0),
        ):
            raise AssertionError("let in")
        assert (tmp_path / LOCK_FILE).exists()
        holder.kill()
        holder.wait()
        with only_job(tmp_path, world_of(), patience_s=0):
            pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_it_waits_for_a_job_that_is_about_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path, 1):
        begun = time.monotonic()
        with only_job(tmp_path, world_of(), patience_s=60):
            assert time.monotonic() - begun > 0.4
    assert capsys.readouterr().out == f"{tmp_path}: another job is training there; waiting 60 s for its end\n"


def test_the_first_rank_alone_asks(tmp_path: Path) -> None:
    with held(tmp_path, 300), only_job(tmp_path, world_of(rank=1), patience_s=0):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"output_dir .*/run: Not a directory"),
        only_job(tmp_path / "file" / "run", world_of()),
    ):
        raise AssertionError("let in")
