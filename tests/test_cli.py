"""The mme command: its output and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mme.cli import main
from mme.config import load_config, save_config
from mme.data.description import file_sum

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL_MODEL = [
    "data.max_seq_len=16",
    "data.batch_size=32",
    "model.embedding_dim=16",
    "model.num_tables=2",
    "model.num_blocks=1",
    "model.moe.num_experts=2",
    "model.moe.top_k=1",
    "loss.num_negatives=8",
    "train.log_every=1",
]


def run_mme(*arguments: str | Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mme", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on standard error; nothing else may have been printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "recommend", "report"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert "Example" in output and f"mme {command} --" in output


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'omegaconf', 'pyarrow'}"
    code = f"import sys, mme.cli; mme.cli.main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert output.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--config"], "Option '--config' requires an argument"),
        (["evaluate"], None),
        (["evaluate", "--run", "x", "--checkpoint", "last"], "'--checkpoint'"),
        (["evaluate", "--chekpoint", "3"], "No such option: --chekpoint"),
        (["recommend", "--run", "x", "--users", "u", "--output", "o", "--top-k", "0"], "'--top-k'"),
        (["recommend", "--run", "x", "--users", "u"], "Missing option '--output'"),
        (["prepare", "--output", "x"], "needs --input or --synthetic"),
        (["prepare", "--output", "x", "--input", "a.csv"], "a.csv: no such file"),
        (["prepare", "--output", "x", "--synthetic", "quickstart", "--format", "csv"], "--format does not go with"),
        (
            ["prepare", "--output", "x", "--input", "a", "b", "--format", "csv", "--users", "3"],
            "--users does not go with",
        ),
        (["evaluate", "--run", "nowhere"], "nowhere: no such run folder"),
        (["report", "--run", "mme"], "mme: has no config.yaml"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_status_2(
    arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(arguments) == 2
    if message is None:  # a command without any argument shows its help
        assert "Usage" in capsys.readouterr().out
    else:
        assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", "did you mean train.steps?"),
        ("nonsense=1", "unknown key"),
        ("train.steps=many", "train.steps"),
        ("train.lr=-1", "train.lr (-1.0) must be above 0"),
        ("train.table_lr=.nan", "train.table_lr (nan) must be finite"),
        ("train.table_lr=1e38", "train.table_lr (1e+38) must be at most 3.4e+37 with train.table_optimizer=adam"),
        ("train.lr=1e38", "train.lr (1e+38) must be above 0 and at most 1000000.0"),
        ("train.beta1=2", "train.beta1 (2.0) must be at least 0 and below 1"),
        ("train.seed=-1", "train.seed (-1) must be at least 0"),
        ("train.lr=${lr}", "Interpolation key 'lr' not found"),
        ("model.num_tables=5", "model.embedding_dim (128) must be divisible by model.num_tables (5)"),
        ("model.moe.top_k=9", "model.moe.top_k (9) must be between 1 and num_experts (8)"),
        ("parallel.expert_parallel_size=3", "must be divisible by parallel.expert_parallel_size (3)"),
        ("parallel.expert_parallel_size=2", "must divide the number of processes (1)"),
        ("loss.negatives=some", "loss.negatives"),
        ("train.steps", "expected key.path=value"),
    ],
)
def test_wrong_configuration_ends_with_one_line_and_status_2(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(REPOSITORY / "configs/quickstart.yaml"), override]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [\n", "\x00\x01"])
def test_a_file_that_is_not_a_configuration(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    assert str(path) in error_line(capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run made by the user's commands."""
    folder = tmp_path_factory.mktemp("first")
    prepared = run_mme(
        "prepare",
        "--synthetic",
        "quickstart",
        "--users",
        "200",
        "--items",
        "60",
        "--seed",
        "1",
        "--output",
        folder / "data",
    )
    assert prepared.returncode == 0, prepared.stderr
    assert "200" in prepared.stdout
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"path": str(folder / "data")}, "output_dir": str(folder / "run")}))
    trained = run_mme("train", "--config", config, *SMALL_MODEL, "train.epochs=1")
    assert trained.returncode == 0, trained.stderr
    for text in ["step ", " tokens/s", "fuxi-mme", "popularity", "times popularity", f"report: {folder / 'run'}"]:
        assert text in trained.stdout, text
    return folder / "run"


def test_a_report_that_fails_leaves_a_finished_training_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 0, so that the launcher does not start the job again; the results are printed nevertheless."""

    def trained(config: Any) -> None:
        run = Path(config.output_dir)
        run.mkdir()
        save_config(config, run / "config.yaml")
        record = {"kind": "eval", "step": 3, "split": "test", "users": 5, "ndcg@10": 0.25}
        lines = [{"kind": "run", "step": 0}, record | {"model": "fuxi-mme"}, record | {"model": "popularity"}]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (run / "report.html").mkdir()

    monkeypatch.setattr("mme.training.train", trained)
    config, run = str(REPOSITORY / "configs/quickstart.yaml"), tmp_path / "run"
    assert main(["train", "--config", config, f"data.path={tmp_path}", f"output_dir={run}"]) == 0
    captured = capsys.readouterr()
    assert "0.2500" in captured.out
    assert captured.err.startswith(
        f"warning: training is done, but its report failed; `mme report --run {run}` writes it: "
    )
    assert captured.err.count("\n") == 1
    assert "Traceback" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_train_writes_all_documented_files(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "report.html", "log.txt"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in records} == {"run", "train", "experts", "eval"}
    tests = {record["model"]: record for record in records if record.get("split") == "test"}
    assert set(tests) == {"fuxi-mme", "popularity"}
    for record in tests.values():
        assert {"step", "protocol", "targets_sha256", "hr@10", "hr@50", "ndcg@10", "ndcg@50", "mrr"} <= set(record)
    neighbours = tests["fuxi-mme"]["insight"]["neighbours"]
    events = [of["events"] for of in neighbours]
    assert len(neighbours) == 8 and events == sorted(events, reverse=True) and events[-1] > 0
    for of in neighbours:
        others = [other["item"] for other in of["nearest"]]
        assert len({of["item"], *others}) == 6 and f"<th>{of['item']}</th>" in (run / "report.html").read_text()
        assert all(-1 <= other["similarity"] <= 1 for other in of["nearest"])


@pytest.mark.slow
def test_evaluate_prints_only_json(run: Path) -> None:
    done = run_mme("evaluate", "--run", run)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    (record,) = [
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record.get("split") == "test" and record.get("model") == "fuxi-mme"
    ]
    assert metrics["ndcg@10"] == pytest.approx(record["ndcg@10"], rel=1e-6)
    elsewhere = run.with_name("trained by two processes")
    shutil.copytree(run, elsewhere)
    text = (run / "config.yaml").read_text().replace("expert_parallel_size: 0", "expert_parallel_size: 2")
    (elsewhere / "config.yaml").write_text(text)
    by_one = run_mme("evaluate", "--run", elsewhere)
    assert by_one.returncode == 0, by_one.stderr
    assert json.loads(by_one.stdout) == metrics | {"run": str(elsewhere)}
    missing = run_mme("evaluate", "--run", run, "--checkpoint", "99999")
    assert missing.returncode == 2 and missing.stdout == ""
    assert "step_99999" in missing.stderr.splitlines()[-1]


@pytest.mark.slow
def test_recommend_writes_top_k_for_each_history(run: Path, tmp_path: Path) -> None:
    data = run.parent / "data"
    raw_ids = pq.read_table(data / "items.parquet").sort_by("item_index")["item_id"].to_pylist()
    histories = pq.read_table(next(data.glob("part-*.parquet"))).slice(0, 7).to_pylist()
    for history in histories:
        history["item_ids"] = [raw_ids[index] for index in history["item_ids"]]
    pq.write_table(pa.Table.from_pylist(histories), tmp_path / "histories.parquet")
    done = run_mme(
        "recommend",
        "--run",
        run,
        "--users",
        tmp_path / "histories.parquet",
        "--top-k",
        "5",
        "--output",
        tmp_path / "top.parquet",
    )
    assert done.returncode == 0, done.stderr
    top = pq.read_table(tmp_path / "top.parquet").to_pylist()
    assert len(top) == 7
    for row, history in zip(top, histories, strict=True):
        assert row["user_id"] == history["user_id"]
        assert len(row["item_ids"]) == len(set(row["item_ids"])) == len(row["scores"]) == 5
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert not set(row["item_ids"]) & set(history["item_ids"])


@pytest.mark.slow
def test_a_data_set_with_other_item_indices_is_rejected(run: Path, tmp_path: Path) -> None:
    for folder in ("data", "run"):
        shutil.copytree(run.parent / folder, tmp_path / folder)
    config = (run / "config.yaml").read_text().replace(str(run.parent / "data"), str(tmp_path / "data"))
    (tmp_path / "run" / "config.yaml").write_text(config)
    items = pq.read_table(tmp_path / "data" / "items.parquet")
    raw_ids = items["item_id"].to_pylist()
    renumbered = items.set_column(items.column_names.index("item_id"), "item_id", pa.array(raw_ids[::-1]))
    pq.write_table(renumbered, tmp_path / "data" / "items.parquet")
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    info["files"]["items.parquet"] = file_sum(tmp_path / "data" / "items.parquet")
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(info))
    users = tmp_path / "histories.parquet"
    pq.write_table(
        pa.table({"user_id": [1], "item_ids": [raw_ids[:2]], "timestamps": [[1_700_001_000, 1_700_002_000]]}), users
    )
    top = tmp_path / "top.parquet"
    evaluated = run_mme("evaluate", "--run", tmp_path / "run")
    recommended = run_mme("recommend", "--run", tmp_path / "run", "--users", users, "--output", top)
    for done in (evaluated, recommended):
        assert done.returncode == 2 and done.stdout == ""
        assert "was trained on a data set whose indices of items or feature values differ" in done.stderr
    assert not top.exists()


@pytest.mark.slow
def test_recommend_rejects_malformed_histories(run: Path, tmp_path: Path) -> None:
    users = tmp_path / "wrong.parquet"
    pq.write_table(pa.table({"user": [1]}), users)
    done = run_mme("recommend", "--run", run, "--users", users, "--output", tmp_path / "top.parquet")
    assert done.returncode == 2
    assert done.stderr == f"error: {users}: no column 'user_id' (found: user)\n"
    assert not (tmp_path / "top.parquet").exists()


@pytest.mark.slow
def test_interrupt_ends_with_one_line_and_the_same_command_resumes(run: Path) -> None:
    output = run.parent / "interrupted"
    arguments = [
        "train",
        "--config",
        run.parent / "config.yaml",
        *SMALL_MODEL,
        "train.epochs=200",
        f"output_dir={output}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mme", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If the tests run in the background of a shell, they and their processes ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(3000):
        if any((output / "checkpoints").glob("step_*")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "error: interrupted; the same command resumes from the newest checkpoint"
    assert "Traceback" not in errors
    done = run_mme("report", "--run", output)
    assert done.returncode == 0 and (output / "report.html").is_file()


def test_an_untrusted_run_writes_only_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.write_text("mine\n")
    (run / "config.yaml").write_text("data: {path: nowhere}\n")
    (run / "metrics.jsonl").write_text('{"kind": "run", "step": 0}\n')
    for name in ("log.txt", "report.html", "report.html.partial"):
        (run / name).symlink_to(mine)
    assert main(["report", "--run", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(mine)
    assert main(["report", "--run", str(run)]) == 2
    assert "config.yaml: a symbolic link, which is not followed here" in capsys.readouterr().err
    assert mine.read_text() == "mine\n"
    os.mkfifo(run / "pipe")
    (run / "metrics.jsonl").unlink()
    (run / "pipe").rename(run / "metrics.jsonl")
    (run / "config.yaml").unlink()
    (run / "config.yaml").write_text("data: {path: nowhere}\n")
    assert main(["report", "--run", str(run)]) == 2
    assert "metrics.jsonl: not a regular file" in capsys.readouterr().err


def test_the_readers_environment_is_not_resolved_into_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text("data: {path: '${oc.env:SECRET}'}\n")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run", "step": 0}\n')
    for command in ("report", "evaluate"):
        assert main([command, "--run", str(tmp_path)]) == 2
        assert "data.path: '${oc.env:SECRET}' is not resolved in a run's configuration" in capsys.readouterr().err
    assert "hunter2" not in (tmp_path / "log.txt").read_text()
    assert load_config(tmp_path / "config.yaml").data.path == "hunter2"  # a file that the user passes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.placement={}", "model.moe.placement: expected a list, found a mapping"),
        ("train.profile_ranks={a: 1}", "train.profile_ranks: expected a list, found a mapping"),
        ("train.profile_ranks=[[1]]", "train.profile_ranks.0: expected a single value, found a list"),
        ("model.moe.top_k={}", "model.moe.top_k: expected a single value, found a mapping"),
        ('data.path="a\\0b"', r"data.path: 'a\x00b': expected a path without control characters"),
        (
            f"output_dir=runs/{'x' * 256}",
            "is too long for a path: expected at most 4095 bytes, and at most 255 for each name in it",
        ),
        (
            f"data.cache_dir={'x/' * 2100}",
            "is too long for a path: expected at most 4095 bytes, and at most 255 for each name in it",
        ),
    ],
)
def test_values_that_are_no_list_or_no_path_are_refused(
    capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["train", "--config", "configs/quickstart.yaml", override]) == 2
    assert message in capsys.readouterr().err
