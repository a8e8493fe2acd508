"""`mme tune` with real training on a small generated set: results, resuming, stopping, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from mme.cli import main
from mme.tune.space import read_space
from mme.tune.study import Search, write_results
from mme.tune.trial import run_trial, training_command, validation_values

CONFIG = Path("configs/quickstart.yaml")
SPACE = "model.dropout: {low: 0.1, high: 0.5, step: 0.1}\nmodel.num_tables: [2, 3]\n"  # 3 does not divide 128
TRAINING = ["train.epochs=2", "train.eval_every=2", "train.log_every=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "data"
    assert (
        main(["prepare", "--synthetic", "quickstart", "--users", "120", "--items", "60", "--output", str(folder)]) == 0
    )
    return folder


def arguments(folder: Path, data: Path, trials: int) -> list[str]:
    (folder / "space.yaml").write_text(SPACE)
    paths = ["--space", str(folder / "space.yaml"), "--output", str(folder / "search")]
    return ["tune", "--config", str(CONFIG), *paths, "--trials", str(trials), f"data.path={data}", *TRAINING]


def trials_of(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((folder / "search" / "trials.json").read_text())
    return found


@pytest.mark.slow
def test_a_killed_search_resumes_and_writes_the_best_configuration(tmp_path: Path, data: Path) -> None:
    command = [sys.executable, "-m", "mme", *arguments(tmp_path, data, 3)]
    search = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not list((tmp_path / "search").glob("trials/*/checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    search.kill()
    search.wait()
    (begun,) = (tmp_path / "search" / "trials").glob("*/checkpoints")

    assert main(arguments(tmp_path, data, 3)) == 0
    rows = trials_of(tmp_path)
    complete = [row for row in rows if row["state"] == "complete"]
    assert complete and begun.parent.name in {row["trial"] for row in complete}
    for row in rows:
        if row["values"] and row["values"]["model.num_tables"] == 3:  # type: ignore[index]
            assert row["state"] == "fail" and "num_tables" in str(row["reason"])
    best = max(complete, key=lambda row: row["ndcg@10"])  # type: ignore[arg-type, return-value]
    assert best["ndcg@10"] == max(validation_values(tmp_path / "search" / "trials" / str(best["trial"]), "ndcg@10"))
    written = yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())
    assert written["output_dir"] == str(tmp_path / "search" / "best")
    assert written["model"]["dropout"] == best["values"]["model.dropout"]  # type: ignore[index]
    kept = {path.parent.name for path in (tmp_path / "search" / "trials").glob("*/checkpoints")}
    assert kept == {best["trial"]}

    before = rows
    assert main(arguments(tmp_path, data, 3)) == 0  # all trials are done
    assert trials_of(tmp_path) == before


@pytest.mark.slow
def test_a_trial_that_lags_behind_is_stopped(tmp_path: Path, data: Path) -> None:
    overrides = [f"data.path={data}", *TRAINING, f"output_dir={tmp_path / 'trial'}", "train.epochs=2000"]
    told: list[tuple[int, float]] = []

    def lags_behind(number: int, value: float) -> bool:
        told.append((number, value))
        return number >= 2

    outcome = run_trial(
        training_command(CONFIG, overrides, 1), tmp_path / "trial", "ndcg@10", {"OMP_NUM_THREADS": "1"}, lags_behind, threading.Event()
    )  # fmt: skip
    assert outcome.status is None
    assert [number for number, _ in told] == list(range(1, len(told) + 1)) and len(told) >= 2
    assert outcome.best == max(value for _, value in told)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "ndcg@20"], "--metric ndcg@20: expected hr@10, hr@50, ndcg@10, ndcg@50, mrr"),
        (
            ["data.protocol=leave_one_out"],
            "mme tune needs a validation split, which data.protocol=leave_one_out does not",
        ),
        (["data.path=nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_every_trial_would_reject_is_found_before_the_first(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([*arguments(tmp_path, data, 1), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "trial" not in printed.out
    assert not (tmp_path / "search").exists()


def test_the_best_configuration_has_a_folder_of_its_own(tmp_path: Path, data: Path) -> None:
    from optuna import create_study
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import create_trial

    (tmp_path / "space.yaml").write_text("model.num_tables: [2, 4]\n")
    search = Search(CONFIG, tmp_path / "space.yaml", tmp_path, [f"data.path={data}"], trials=2)
    study = create_study(direction="maximize")
    for tables, value in (("2", 0.1), ("4", 0.2)):
        chosen = {"model.num_tables": CategoricalDistribution(["2", "4"])}
        study.add_trial(create_trial(params={"model.num_tables": tables}, distributions=chosen, value=value))
    result = write_results(search, read_space(search.space, CONFIG, search.overrides), study)
    written = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert (result.best, written["model"]["num_tables"]) == (0.2, 4)
    assert written["output_dir"] == str(tmp_path / "best") and written["data"]["path"] == str(data)


def test_another_search_in_the_same_folder_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    from optuna import create_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = create_study(storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))), study_name="mme")
    study.set_user_attr("space", "another")
    assert main(arguments(tmp_path, data, 1)) == 2
    assert "contains a search with another space" in capsys.readouterr().err


def test_a_failed_trial_gives_the_reason(tmp_path: Path) -> None:
    outcome = run_trial(
        training_command(CONFIG, [f"data.path={tmp_path}/nothing", f"output_dir={tmp_path}/trial"], 1),
        tmp_path / "trial",
        "ndcg@10",
        {},
        lambda number, value: False,
        threading.Event(),
    )
    assert outcome.status == 2 and outcome.best is None
    assert outcome.error.startswith(f"error: {tmp_path}/nothing: no such folder")


def test_links_in_a_searchs_folder_are_not_followed(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "canary").write_text("mine")
    search = tmp_path / "search"

    def refused(name: str, target: Path) -> str:
        search.mkdir(exist_ok=True)
        (search / name).parent.mkdir(exist_ok=True)
        (search / name).symlink_to(target)
        assert main(arguments(tmp_path, data, 1)) == 2
        (search / name).unlink()
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        return printed

    assert "search/trials: a symbolic link" in refused("trials", mine)
    assert "search/.lock: a symbolic link" in refused(".lock", mine / "canary")
    assert "search/journal.log: not a regular file" in refused("journal.log", mine / "canary")
    assert "search/trials/0: a symbolic link" in refused("trials/0", mine)
    assert [path.name for path in mine.iterdir()] == ["canary"] and (mine / "canary").read_text() == "mine"


def test_a_journal_names_no_folder_outside_the_search(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial writes to its folder and removes checkpoints there, so a journal must not choose the folder freely."""
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    command = arguments(tmp_path, data, 1)
    (tmp_path / "space.yaml").write_text("model.num_tables: [3]\n")  # no valid configuration: nothing is trained
    assert main(command) == 2
    capsys.readouterr()
    journal = tmp_path / "search" / "journal.log"
    text = journal.read_text()
    assert '"folder":"0"' in text
    journal.write_text(text.replace('"folder":"0"', '"folder":"../../mine"'))
    assert main(command) == 2
    assert "journal.log: trial 0: folder '../../mine', expected the number of a trial" in capsys.readouterr().err
    assert (tmp_path / "mine" / "checkpoints").is_dir()


def test_a_stopped_search_ends_its_trial(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(InterruptedError):
        run_trial(waits, tmp_path / "trial", "ndcg@10", {}, lambda number, value: False, stop)
