"""SIGTERM ends a process that is stuck, and is otherwise only noted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mme.run.preemption import Preemption

REPOSITORY = Path(__file__).resolve().parents[2]

STUCK = """
import sys, threading
from pathlib import Path
from mme.run.preemption import Preemption
with Preemption(Path(sys.argv[1]), stops_within_s=1):
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


def test_a_process_that_is_stuck_leaves_by_itself(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    (line,) = errors.splitlines()
    assert line.startswith("asked to stop, but a step did not end within 1 s: nothing is saved")
    assert line in (tmp_path / "log.txt").read_text()


def test_a_process_that_gets_on_is_left_alone(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(tmp_path, stops_within_s=0.5) as preemption:
        assert not preemption.requested
    assert signal.getsignal(signal.SIGTERM) is before
    with Preemption(tmp_path, stops_within_s=0.5) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert preemption.requested
    time.sleep(1)  # the process is there after the limit
    signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "log.txt").exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors


HANGS = """
import os, sys, threading
from mme import cli
from mme.step import TrainStep
call = TrainStep.__call__
def stuck(self, step, *rest, **named):
    if step == 3 and os.environ["RANK"] == sys.argv[1]:
        print("stuck", file=sys.stderr, flush=True)
        threading.Event().wait()
    return call(self, step, *rest, **named)
TrainStep.__call__ = stuck
sys.exit(cli.main(sys.argv[2:]))
"""
LAUNCH = """
import sys
from pathlib import Path
from launcher import torchrun
from launcher.job import Job
sys.exit(torchrun.run(Job(Path("x"), (), 1, 2, 3), resumes=True, module=sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["stuck in a step", "frozen"])
def test_a_job_with_a_stuck_worker_ends_within_60_seconds(tmp_path: Path, frozen: bool) -> None:
    """Rank 0 waits in a collective for rank 1, which hangs in a step; a frozen process can't even exit by itself."""
    import psutil

    from mme.prepare.synthetic import prepare_synthetic
    from tests.test_train import SMALL

    prepare_synthetic("quickstart", tmp_path / "data", users=100, items=120, seed=3)
    (tmp_path / "hanging_worker.py").write_text(HANGS)
    config = REPOSITORY / "configs" / "quickstart.yaml"
    arguments = ["train", "--config", str(config), f"data.path={tmp_path}/data", f"output_dir={tmp_path}/run", *SMALL]
    with (tmp_path / "errors.txt").open("w") as errors:
        job = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "hanging_worker", "1", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        until = time.monotonic() + 300
        while "stuck" not in (tmp_path / "errors.txt").read_text():
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        workers = [process for process in psutil.Process(job.pid).children(recursive=True) if is_worker(process)]
        assert len(workers) == 2
        if frozen:
            next(worker for worker in workers if worker.environ()["RANK"] == "1").suspend()
        sent = time.monotonic()
        job.terminate()
        assert job.wait(120) == 143
        assert time.monotonic() - sent < 60
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    finally:
        if job.poll() is None:
            for process in psutil.Process(job.pid).children(recursive=True):
                process.kill()
            job.kill()
    text = (tmp_path / "errors.txt").read_text()
    assert "asked to stop, but a step did not end within 45 s" in text
    assert ("killed 1 worker(s) that did not stop within 53 s" in text) == frozen


def is_worker(process: object) -> bool:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        return "hanging_worker" in process.cmdline() and "torch.distributed.run" not in process.cmdline()
    except psutil.Error:
        return False
