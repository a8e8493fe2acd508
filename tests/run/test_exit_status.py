"""How commands end: one line on standard error, the traceback in the log, and the exit status."""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
from pathlib import Path

import pytest
import typer

from mme.cli import main
from mme.errors import UserError
from mme.run.exit_status import job_status, print_error
from tests.limits import files_of_at_most


def test_an_error_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two writes another rank's line could come between them, because torchrun's workers are unbuffered."""
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reading, writing, writing.makefile("wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        print_error("what is wrong")
        assert reading.recv(1000) == b"error: what is wrong\n"


def test_other_ranks_leave_the_line_to_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["report", "--run", "nowhere"]) == 2
    assert capsys.readouterr().err == ""


def test_failed_job_ends_with_status_1_and_its_traceback_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("data: {path: nowhere}\n")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "step": 0}\n')
    with files_of_at_most(4000):  # enough for the log, too small for the report
        assert main(["report", "--run", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'report.html'}: File too large (traceback in {tmp_path / 'log.txt'})\n"
    )
    assert "OSError: [Errno 27]" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("launched", "status"), [(False, 1), (True, 3)])
def test_a_full_disk_ends_in_one_line_without_a_restart(
    launched: bool, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")  # under torchrun the status informs the launcher
    with pytest.raises(typer.Exit) as ended, job_status():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    assert ended.value.exit_code == status
    assert capsys.readouterr().err == "error: metrics.jsonl: No space left on device\n"


@pytest.mark.parametrize(("local_rank", "printed"), [("0", "rank 3: error: the disk is full\n"), ("1", "")])
def test_an_error_of_one_node_is_reported_there_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, printed: str
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(typer.Exit) as ended, job_status():
        raise UserError("the disk is full")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == printed


def test_control_characters_stay_escaped_in_messages_and_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text('"\\nrm -rf ~ #\\e[2J": 1\n')
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "step": 0}\n')
    assert main(["report", "--run", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and found.endswith("\n")
    for text in (found, (tmp_path / "log.txt").read_text()):
        assert r"\nrm -rf ~ #\x1b[2J: unknown key" in text and "\x1b" not in text
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
