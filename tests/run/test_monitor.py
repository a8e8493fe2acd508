"""The progress line and the files that monitoring leaves in the run's folder."""

from __future__ import annotations

import io
import json
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mme.errors import UserError
from mme.run.expert_load import greedy_experts, starved_experts
from mme.run.metrics_file import read_metrics
from mme.run.monitor import Monitor, duration
from tests.limits import files_of_at_most


class Clock:
    """A clock whose seconds pass only on request."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=120)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def train(monitor: Monitor, first: int, last: int, loss_of=lambda step: 1 / step) -> None:
    for step in range(first, last + 1):
        monitor.train_step(step, step // 10, loss=loss_of(step), tokens=100, step_s=0.5, lr=1e-3)


def test_a_line_every_log_every_steps_with_every_bit_of_the_loss(tmp_path: Path) -> None:
    loss = torch.tensor(1 / 3, dtype=torch.float32)
    with Monitor(tmp_path, total_steps=7, log_every=3, console=plain_console()) as monitor:
        for step in range(1, 8):
            monitor.train_step(
                step,
                0,
                loss=loss * step,
                tokens=10 * step,
                step_s=0.25,
                lr=1e-3,
                extra={"grad_norm": torch.tensor(2.0)},
            )
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 7]
    assert [record["loss"] for record in records] == [(loss * step).item() for step in (3, 6, 7)]
    assert records[1]["tokens_per_s"] == (40 + 50 + 60) / 0.75
    assert records[1]["step_ms"] == 250
    assert records[1]["grad_norm"] == 2.0


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=100, log_every=1, console=plain_console())
    train(monitor, 1, 2)
    monitor.note("half way")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "half way" in (tmp_path / "log.txt").read_text()
    monitor.close()
    monitor.close()


def test_resumed_run_reads_as_one_uninterrupted_run(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with Monitor(whole, total_steps=40, log_every=5, console=plain_console()) as monitor:
        train(monitor, 1, 40)
    with Monitor(cut, total_steps=40, log_every=5, console=plain_console()) as monitor:
        train(monitor, 1, 28)
    with (cut / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "step": 30, "lo')  # as a killed process leaves it
    with Monitor(cut, total_steps=40, log_every=5, console=plain_console()) as monitor:
        monitor.resume_at(22, 40)  # the checkpoint is between two lines
        train(monitor, 23, 40)

    def losses(run: Path) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]

    assert losses(cut) == losses(whole)
    assert not list(cut.glob("*.partial"))


def test_new_run_in_an_old_folder_starts_metrics_from_the_beginning(tmp_path: Path) -> None:
    for _ in range(2):
        with Monitor(tmp_path, total_steps=10, log_every=5, console=plain_console()) as monitor:
            monitor.run_info({"device": "cpu"})
            train(monitor, 1, 10)
    assert [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")] == ["run", "train", "train"]


def test_only_rank_0_writes_metrics_and_each_rank_its_log(tmp_path: Path) -> None:
    consoles = [plain_console(), plain_console()]
    for rank, console in enumerate(consoles):
        with Monitor(tmp_path, total_steps=2, rank=rank, world_size=2, log_every=1, console=console) as monitor:
            monitor.run_info({"device": "cpu"})
            train(monitor, 1, 2)
            monitor.experts(2, [[[0.5, 0.5]]])
            monitor.evaluation({"model": "fuxi-mme", "split": "test", "step": 2, "ndcg@10": 0.1})
            monitor.note(f"from rank {rank}")
    kinds = [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds == ["run", "train", "train", "experts", "eval"]
    assert "from rank 1" in (tmp_path / "log.rank1.txt").read_text()
    assert "from rank 0" in (tmp_path / "log.txt").read_text()
    assert shown(consoles[1]) == ""


def test_plain_lines_come_every_few_seconds_and_count_the_time_left(tmp_path: Path) -> None:
    clock, console = Clock(), plain_console()
    with Monitor(tmp_path, total_steps=101, console=console, clock=clock) as monitor:
        for step in range(1, 102):
            clock.now += 2.0
            train(monitor, step, step)
    lines = shown(console).splitlines()
    assert len(lines) == 1 + 20  # the first step, then one in ten seconds; the last step falls on one of them
    assert lines[1].startswith("step 6/101") and lines[1].endswith("3:10 left")
    assert "loss 0.1667  200 tokens/s" in lines[1]
    assert lines[-1].startswith("step 101/101") and lines[-1].endswith("done in 3:20")


def test_terminal_gets_one_live_line(tmp_path: Path) -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Monitor(tmp_path, total_steps=100, console=console, clock=clock) as monitor:
        for step in range(1, 41):
            clock.now += 1.0
            train(monitor, step, step)
    output = shown(console)
    assert "step 40/100" in output and "tokens/s  1:00 left" in output
    assert "step" not in (tmp_path / "log.txt").read_text()


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    with Monitor(tmp_path, total_steps=4, log_every=2, console=plain_console()) as monitor:
        train(monitor, 1, 4)
        monitor.experts(4, [[[0.25, 0.75]], [[0.5, 0.5]]], [[0.4], [0.6]])
        monitor.evaluation({"model": "fuxi-mme", "split": "valid", "step": 4, "ndcg@10": 0.125, "users": 7})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 0.5), (4, 0.25)]
    assert events.Scalars("eval/fuxi-mme/valid/ndcg@10")[0].value == 0.125
    assert events.Scalars("experts/largest_share/block0_view0")[0].value == 0.75
    assert events.Scalars("experts/entropy/block1_view0")[0].value == pytest.approx(0.6)


def test_loss_that_is_not_finite_is_null_and_noted(tmp_path: Path) -> None:
    console = plain_console()
    with Monitor(tmp_path, total_steps=1, log_every=1, console=console) as monitor:
        train(monitor, 1, 1, loss_of=lambda step: math.nan)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["loss"] is None
    assert "the loss at step 1 is nan" in shown(console)


def test_starved_expert_is_noted_once(tmp_path: Path) -> None:
    console = plain_console()
    # Expert 0, which only view 0 uses, is not starved. Expert 2 gets 1% of an even third.
    load = [[[0.6, 0.39, 0.01], [0.0, 1.0, 0.0]]]
    assert starved_experts(load) == [(0, 2, 0.005)]
    with Monitor(tmp_path, total_steps=2, console=console) as monitor:
        monitor.experts(1, load, blocks=[3])
        monitor.experts(2, load, blocks=[3])
    assert shown(console).count("expert 2 of block 3 gets 0.50% of the tokens at step 1") == 1
    assert "step 2" not in shown(console)


def test_an_expert_that_takes_all_is_noted_once(tmp_path: Path) -> None:
    console = plain_console()
    load = [[[0.48, 0.3, 0.22], [0.46, 0.3, 0.24]]]  # with two experts per token, one can get half of the choices
    assert greedy_experts(load, 2) == [(0, 0, 0.47)]
    assert greedy_experts(load, 1) == []
    assert greedy_experts([[[0.5, 0.5]]], 2) == []  # each token must take both
    with Monitor(tmp_path, total_steps=2, console=console) as monitor:
        for step in (1, 2):
            monitor.experts(step, load, blocks=[3], top_k=2)
    assert shown(console) == "warning: expert 0 of block 3 takes 47.0% of the tokens, of 50% possible, at step 1\n"


def test_warnings_of_libraries_go_to_the_log_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Monitor(tmp_path, total_steps=1, console=plain_console()), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # an earlier test may have left it on, without pytest's knowing
        logging.captureWarnings(True)
        warnings.warn("something will change in the next version", stacklevel=1)
        logging.captureWarnings(False)
    assert "something will change" in (tmp_path / "log.txt").read_text()
    assert "something will change" not in "".join(capfd.readouterr())


def test_run_info_names_versions_and_command(tmp_path: Path) -> None:
    console = plain_console()
    with Monitor(tmp_path, total_steps=1, world_size=2, console=console) as monitor:
        monitor.run_info({"device": "cpu", "parameters": {"tables": 1000, "decoder": 10}})
    assert shown(console) == f"{tmp_path}: 1,010 parameters, 2 processes on cpu, 1 steps\n"
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["versions"]["torch"] == torch.__version__
    assert record["world_size"] == 2 and record["device"] == "cpu" and record["command"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "train", "step": 1}\nnot json\n', "line 2: expected a JSON object with a kind, found 'not json'"),
        ('[1]\n{"kind": "train"}\n', "line 1: expected a JSON object with a kind, found '[1]'"),
    ],
)
def test_damaged_metrics_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl") as caught:
        read_metrics(path)
    assert message in str(caught.value)


def test_line_cut_off_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert read_metrics(path) == [{"kind": "train", "step": 1}]


def test_missing_and_binary_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"metrics\.jsonl: not text \(byte 0\)"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_full_disk_is_named(tmp_path: Path) -> None:
    with (
        Monitor(tmp_path, total_steps=1, console=plain_console()) as monitor,
        files_of_at_most(0),
        pytest.raises(OSError, match="File too large") as caught,
    ):
        monitor.note("this finds no room")
    assert caught.value.filename == str(tmp_path / "log.txt")


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir .*file: File exists: expected a folder that can be made"):
        Monitor(tmp_path / "file", total_steps=1)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
