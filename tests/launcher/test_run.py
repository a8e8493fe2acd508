"""`launcher run` starts the right command, rejects wrong input before that, and ends with its workers."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import torchrun
from launcher.job import Job
from launcher.torchrun_output import own_lines
from tests.launcher.command_line import CONFIG, REPOSITORY, launch, the_error
from tests.ports import free_port

PATIENCE_S = 300


def test_dry_run_prints_the_torchrun_command_of_two_cpu_processes() -> None:
    done = launch("run", "--config", CONFIG, "train.epochs=2", "--dry-run", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    store, patience, gloo, nccl, *words = shlex.split(done.stdout)
    assert (store, patience) == ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60")
    assert (gloo, nccl) == ("GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo")
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[words.index("--rdzv-conf") + 1] == "store_type=file"
    assert words[words.index("--local-addr") + 1] == "127.0.0.1"
    assert not Path(words[words.index("--rdzv-endpoint") + 1]).exists()
    assert words[words.index("--nproc-per-node") + 1] == "2"
    assert words[-6:] == ["-m", "mme", "train", "--config", CONFIG, "train.epochs=2"]


def test_dry_run_of_two_nodes_names_the_rendezvous() -> None:
    arguments = ["--nnodes", "2", "--nproc-per-node", "4", "--rdzv-endpoint", "127.0.0.1:29411", "--max-restarts", "7"]
    words = shlex.split(launch("run", "--config", CONFIG, *arguments, "--dry-run").stdout)
    for option, value in [
        ("--nnodes", "2"),
        ("--nproc-per-node", "4"),
        ("--rdzv-endpoint", "127.0.0.1:29411"),
        ("--rdzv-backend", "c10d"),
        ("--local-addr", "127.0.0.1"),
        ("--max-restarts", "7"),
    ]:
        assert words[words.index(option) + 1] == value


def test_the_rendezvous_of_another_job_has_another_id(tmp_path: Path) -> None:
    def id_of(*overrides: str) -> str:
        arguments = ["run", "--config", CONFIG, "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29411", "--dry-run"]
        words = shlex.split(launch(*arguments, f"data.path={tmp_path}", *overrides).stdout)
        return words[words.index("--rdzv-id") + 1]

    first = id_of()
    assert first == id_of() == id_of("train.lr=0.004", "train.lr=0.004")
    (tmp_path / "dataset.json").write_text("{}")
    assert len({first, id_of(), id_of("train.seed=1"), id_of("output_dir=runs/other")}) == 4


@pytest.mark.parametrize("command", ["run", "slurm", "kubernetes", "preflight", "plan"])
def test_help_has_an_example(command: str) -> None:
    done = launch(command, "--help")
    assert done.returncode == 0
    assert f"mme-launch {command}" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config", "no.yaml"], "no.yaml: no such configuration file"),
        (["run", "--config", CONFIG, "train.epoch=1"], "train.epoch: unknown key (did you mean train.epochs?)"),
        (["run", "--config", CONFIG, "--nproc-per-node", "3", "parallel.expert_parallel_size=2"], "processes (3)"),
        (["run", "--config", CONFIG, "--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        (["run", "--config", CONFIG, "--rdzv-endpoint", "here"], "--rdzv-endpoint here: expected HOST:PORT"),
        (["run", "--config", CONFIG, "--nproc-per-node", "0"], "'--nproc-per-node'"),
        (["run", "--config", CONFIG, "--nnode", "2"], "No such option: --nnode"),
        (["slurm", "--config", CONFIG, "model.moe.num_experts=6", "parallel.expert_parallel_size=4"], "(6)"),
        (["plan", "--config", CONFIG, "--gpu", "abacus"], "abacus"),
        (["walk"], "No such command 'walk'"),
        (["run", "--config", CONFIG, "--nnodes", "4:2"], "--nnodes 4:2: MIN (4) must not exceed MAX (2)"),
        (["run", "--config", CONFIG, "--nnodes", "0:2"], "--nnodes '0:2': expected a number of nodes, or MIN:MAX"),
        (["run", "--config", CONFIG, "--nnodes", "1:2"], "--nnodes 1:2 needs --rdzv-endpoint HOST:PORT"),
        (
            ["run", "--config", CONFIG, "--nnodes", "2:3", "--nproc-per-node", "1", "parallel.expert_parallel_size=2"],
            "parallel.expert_parallel_size (2) must divide the number of processes (3)",
        ),
    ],
)
def test_wrong_arguments_are_rejected_in_one_line(arguments: list[str], message: str) -> None:
    assert message in the_error(launch(*arguments, "--dry-run"))


def test_missing_data_is_rejected_before_anything_starts(tmp_path: Path) -> None:
    run = ["run", "--config", CONFIG]
    assert "no such folder" in the_error(launch(*run, f"data.path={tmp_path}/none"))
    assert "no dataset.json" in the_error(launch(*run, f"data.path={tmp_path}"))
    (tmp_path / "dataset.json").write_text("{")
    assert "dataset.json: not JSON (" in the_error(launch(*run, f"data.path={tmp_path}"))


@pytest.mark.parametrize("nnodes", [1, 2])
def test_a_port_that_another_program_holds_is_named(tmp_path: Path, nnodes: int) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["--nnodes", str(nnodes), "--rdzv-endpoint", endpoint, f"data.path={tmp_path}"]
        message = the_error(launch("run", "--config", CONFIG, *arguments))
    assert f"--rdzv-endpoint {endpoint}: port" in message
    assert "in use on this machine by" in message


WORKER = """
import os, pathlib, sys, time
folder, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
tries = folder / f"tries-{rank}"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
sys.stderr.write(f"worker {rank} speaks\\n")  # a single write, which the other worker's line cannot split
if behaviour == "refuses":
    if rank == "0":
        sys.stderr.write("error: data.path: what was found, what was expected\\n")
    sys.exit(2)
if behaviour == "dies once" and rank == "1" and len(tries.read_text()) == 1:
    os.kill(os.getpid(), 9)
if behaviour == "listens":
    import psutil
    connections = psutil.Process(os.getppid()).net_connections("tcp")
    listening = [each.laddr for each in connections if each.status == "LISTEN"]
    (folder / f"listening-{rank}").write_text(repr(listening))
if behaviour == "always fails":
    raise ValueError("the worker's own traceback")
if behaviour == "waits":
    (folder / f"waiting-{rank}").write_text("")
    time.sleep(60)
"""

LAUNCH = """
import sys
from pathlib import Path
from launcher import torchrun
from launcher.job import Job
job = Job(Path("x"), (), 1, 2, int(sys.argv[1]))
sys.exit(torchrun.run(job, resumes=True, module=sys.argv[2:]))
"""


def start_workers(folder: Path, behaviour: str, max_restarts: int) -> subprocess.Popen[str]:
    (folder / "behaving_worker.py").write_text(WORKER)
    (folder / "temporary").mkdir()
    arguments = [str(max_restarts), "behaving_worker", str(folder), behaviour]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments],
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{REPOSITORY}:{folder}",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder / "temporary"),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_rejected_input_ends_the_job_with_status_2_and_one_line(tmp_path: Path) -> None:
    launcher = start_workers(tmp_path, "refuses", max_restarts=3)
    _, errors = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 2
    lines = [line for line in errors.splitlines() if "speaks" not in line]
    assert lines == ["error: data.path: what was found, what was expected"]


def test_torchrun_opens_no_port_on_one_node_and_leaves_no_file(tmp_path: Path) -> None:
    launcher = start_workers(tmp_path, "listens", max_restarts=0)
    _, errors = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0, errors
    assert [(tmp_path / f"listening-{rank}").read_text() for rank in (0, 1)] == ["[]", "[]"]
    assert all("speaks" in line for line in errors.splitlines())
    assert not list((tmp_path / "temporary").glob("mme-*"))


def test_workers_restart_after_one_has_died(tmp_path: Path) -> None:
    launcher = start_workers(tmp_path, "dies once", max_restarts=2)
    _, errors = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0
    assert (tmp_path / "tries-1").read_text() == "xx"
    lines = [line for line in errors.splitlines() if "speaks" not in line]
    assert lines == [
        "launcher: worker 1 of this node was killed by signal 9 (SIGKILL); all workers restart and resume from the "
        "last complete checkpoint (restart 1 of 2)"
    ]


def test_a_job_that_always_fails_shows_the_workers_traceback_and_not_torchruns(tmp_path: Path) -> None:
    launcher = start_workers(tmp_path, "always fails", max_restarts=1)
    _, errors = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 1
    assert "ValueError: the worker's own traceback" in errors
    assert "no restart is left" in errors
    assert "torch/distributed" not in errors
    assert "ChildFailedError" not in errors


def test_a_signal_reaches_the_workers(tmp_path: Path) -> None:
    launcher = start_workers(tmp_path, "waits", max_restarts=3)
    while len(list(tmp_path.glob("waiting-*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert (tmp_path / "tries-0").read_text() == "x"


def test_workers_tracebacks_are_kept_among_torchruns_lines() -> None:
    mine = ["Traceback (most recent call last):\n", '  File "a.py", line 1\n', "ValueError: mine\n"]
    follows = ["\n", "The above exception was the direct cause of the following exception:\n", "\n"]
    logged = "E1123 14:07:23.509000 18036 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)\n"
    native = ["[E1124 06:23:13.2517 socket.cpp:1028] [c10d] timed out\n", "frame #0: c10::Error::Error() + 0x9d\n"]
    last = "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: failed\n"
    logs: list[str] = []
    lines = [*mine, *follows, *mine, logged, "more\n", *native, *mine, *follows, *mine[:2], last, "=====\n"]
    assert list(own_lines(lines, logs.append)) == [*mine, *follows, *mine, "more\n"]
    assert logs == [logged, last]


def test_missing_nodes_are_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    endpoint = f"127.0.0.1:{free_port()}"
    arguments = ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--rdzv-timeout", "3", f"data.path={tmp_path}"]
    done = launch("run", "--config", CONFIG, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"launcher: waiting for 2 nodes at {endpoint}, at most 3 s",
        f"launcher: fewer than 2 nodes joined at {endpoint} within 3 s: a node is down, unreachable or not started",
        "launcher: to resume from the last complete checkpoint, run the same command on all nodes",
    ]


def test_cores_are_shared_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(10)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    job = Job(Path("x.yaml"), (), 1, 4, 0)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert torchrun.environment(job) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert torchrun.environment(job) == {}
