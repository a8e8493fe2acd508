"""Curves in the real packages of the trackers: wandb offline, MLflow in a database file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mme.cli import main
from mme.errors import UserError
from mme.run.monitor import Monitor
from mme.run.trackers import IDS_FILE, PACKAGES, TrackedRun
from tests.run.test_monitor import plain_console, shown, train

BLOCK, FULL, LAST = 32_768, 1, 4  # of LevelDB's log
SETTINGS = {"train.lr": 0.001, "data.path": "datasets/a", **{f"key{place}": place for place in range(120)}}


def monitor(folder: Path, *trackers: str) -> Monitor:
    return Monitor(folder, total_steps=4, log_every=2, console=plain_console(), trackers=trackers, settings=SETTINGS)


def track(folder: Path, *trackers: str) -> str:
    """Trains two steps and is interrupted, then resumes; the test metrics belong to step 2. Returns what is shown."""
    with pytest.raises(KeyboardInterrupt), monitor(folder, *trackers) as first:
        first.run_info({"device": "cpu"})
        train(first, 1, 2)
        raise KeyboardInterrupt
    time.sleep(1.1)  # wandb names the files of a start by its second
    with monitor(folder, *trackers) as second:
        second.resume_at(2, 4)
        second.run_info({"device": "cpu"})
        train(second, 3, 4)
        second.experts(4, [[[0.5, 0.5]]] * 600)  # 1,200 curves, more than MLflow takes in one request
        second.evaluation({"model": "fuxi-mme", "split": "test", "step": 2, "ndcg@10": 0.125, "users": 7})
    return shown(second._console)


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a database file, with which nothing is left in the working folder."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def runs_of(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("mme")
    return list(client.search_runs([experiment.experiment_id]))


def test_something_else_in_place_of_the_ids_is_named(tmp_path: Path) -> None:
    assert TrackedRun(tmp_path, resume_step=2).earlier_id("wandb") is None
    (tmp_path / "elsewhere.json").write_text('{"wandb": "stolen"}')
    (tmp_path / IDS_FILE).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=rf"{IDS_FILE}: .*: expected a regular file"):
        TrackedRun(tmp_path, resume_step=2).earlier_id("wandb")


@pytest.mark.slow
def test_mlflow_has_one_run_with_curves_and_parameters(tmp_path: Path, mlflow_store: Any) -> None:
    printed = track(tmp_path / "first", "mlflow")
    (run,) = runs_of(mlflow_store)
    assert f"mlflow: run {run.info.run_id} in sqlite:///{tmp_path}/mlflow.db" in printed
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {key: str(value) for key, value in SETTINGS.items()}
    assert sum(name.startswith("experts/") for name in run.data.metrics) == 1200
    history = mlflow_store.get_metric_history(run.info.run_id, "train/loss")
    assert [(of.step, of.value) for of in history] == [(2, 0.5), (4, 0.25)]
    (tested,) = mlflow_store.get_metric_history(run.info.run_id, "eval/fuxi-mme/test/ndcg_at_10")
    assert (tested.step, tested.value) == (2, 0.125)

    with pytest.raises(KeyboardInterrupt), monitor(tmp_path / "second", "mlflow") as interrupted:
        interrupted.run_info({})
        raise KeyboardInterrupt
    assert {run.info.run_name: run.info.status for run in runs_of(mlflow_store)}["second"] == "FAILED"

    mlflow_store.delete_run(run.info.run_id)  # an error of the tracker must not end the training
    (tmp_path / "third").mkdir()
    with monitor(tmp_path / "third", "mlflow") as third:
        third.run_info({})
        mlflow_store.delete_run(next(of.info.run_id for of in runs_of(mlflow_store) if of.info.run_name == "third"))
        train(third, 1, 2)
    assert "warning: mlflow: " in shown(third._console)
    assert '"step": 2' in (tmp_path / "third" / "metrics.jsonl").read_text()


def test_wandb_offline_has_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(tmp_path / "run", "wandb")
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1  # one run, which `wandb sync` joins
    records = [record for folder in folders for record in finished(folder)]
    config = {item.key or item.nested_key[0]: item.value_json for of in records for item in of.run.config.update}
    assert config["train.lr"] == "0.001" and config["data.path"] == '"datasets/a"'
    rows = [{item.key or item.nested_key[0]: item.value_json for item in of.history.item} for of in records]
    curve = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert curve == [("2", "0.5"), ("4", "0.25")]
    assert [
        (row["step"], row["eval/fuxi-mme/test/ndcg@10"]) for row in rows if "eval/fuxi-mme/test/ndcg@10" in row
    ] == [("2", "0.125")]
    defined = {of.metric.name or of.metric.glob_name: of.metric.step_metric for of in records if of.HasField("metric")}
    assert defined["*"] == "step"
    assert [of.exit.exit_code for of in records if of.HasField("exit")] == [1, 0]


def test_a_link_in_place_of_wandbs_folder_is_not_followed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"), monitor(tmp_path / "run", "wandb") as started:
        started.run_info({})
    assert list((tmp_path / "mine").iterdir()) == []


def finished(folder: Path) -> list[Any]:
    """The records of an offline run, which wandb's process may still be writing for a moment."""
    deadline = time.monotonic() + 60
    while True:
        records = written(folder)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, f"{folder}: no record of the run's end"
        time.sleep(0.1)


def written(folder: Path) -> list[Any]:
    """The records of an offline run: protocol buffers in the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = next(folder.glob("run-*.wandb")).read_bytes()
    records, parts, place = [], b"", 7
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:  # too short for a header
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):  # not written yet
            break
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_without_credentials_wandb_ends_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "from pathlib import Path; from mme.run.exit_status import job_status; from mme.run.monitor import Monitor\n"
        f"with job_status(), Monitor(Path({str(tmp_path / 'run')!r}), total_steps=1, trackers=['wandb']) as monitor:\n"
        "    monitor.run_info({})"
    )
    # In another process, because wandb reads its environment variables once.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "error: train.trackers: wandb: No API key configured." in done.stderr
    assert "(WANDB_MODE=offline needs neither an account nor a network)\n" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / IDS_FILE).exists()


def test_an_unusable_store_ends_in_one_line(tmp_path: Path, mlflow_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://nowhere")
    with (
        pytest.raises(UserError, match=r"^train\.trackers: mlflow: .*ftp"),
        monitor(tmp_path / "run", "mlflow") as started,
    ):
        started.run_info({})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    run = tmp_path / "run"
    given = [f"output_dir={run}", f"data.path={tmp_path}", f"train.trackers=[tensorboard,{name}]"]
    assert main(["train", "--config", "configs/quickstart.yaml", *given]) == 2
    printed = capsys.readouterr().err
    assert f"error: train.trackers names {name}, which is not installed: `pip install 'mme[{name}]'`\n" in printed
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[wandbb]", "train.trackers names 'wandbb': expected tensorboard, wandb, mlflow"),
        ("[mlflow,mlflow]", "train.trackers names mlflow twice"),
    ],
)
def test_wrong_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str) -> None:
    given = [f"output_dir={tmp_path / 'run'}", f"train.trackers={value}"]
    assert main(["train", "--config", "configs/quickstart.yaml", *given]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_no_tracker_writes_nothing_but_the_metrics(tmp_path: Path) -> None:
    with monitor(tmp_path) as none:
        none.run_info({})
        train(none, 1, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "log.txt"}
