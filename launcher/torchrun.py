"""Runs a job on this node through torchrun and summarises torchrun's long messages in one line each.

The workers' output reaches the terminal unchanged. torchrun's own lines on standard error (its log, and the traceback
that follows a failed worker) are not shown; they are parsed to find out which worker failed. When a worker exits with
status 2, the input or the configuration is wrong and no worker restarts.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from launcher.job import Job
from launcher.rendezvous import hosts_unrecognised, local_address, meeting_file
from launcher.same_job import other_job
from launcher.torchrun_output import LAST_WORDS, own_lines, say
from mme.errors import one_line
from mme.run.exit_status import INTERRUPTED, NO_RESTART, PREEMPTED, USER_ERROR
from mme.run.preemption import signal_when_parent_dies

PREFLIGHT_ID = "mme-preflight"
LOOPBACK, LOOPBACK_INTERFACE = "127.0.0.1", "lo"
UNANSWERED_S = 30  # margin beyond torchrun's time limits for connecting to the rendezvous and waiting for the nodes
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
IMPORT_WITHIN_S = 60
STOPS_WITHIN_S = 60  # from the request to stop until torchrun kills the workers; they write a checkpoint meanwhile
KILLED_AFTER_S = 53  # the launcher kills stuck workers before that; `mme.run.preemption` exits by itself even earlier

WORKER_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
NOT_MET = re.compile(re.escape(LAST_WORDS) + r"rendezvous\.api\.Rendezvous(\w+)Error")


def command(job: Job, module: list[str] | None = None, meeting: Path | None = None) -> list[str]:
    """torchrun's command line for this node.

    A single node uses a file as its rendezvous, and its workers communicate over the loopback interface. torchrun's own
    store, which `--standalone` uses, would listen on every interface, and anyone who reaches it can run code in the job.

    On several nodes, workers get this node's address on the route to the rendezvous if that host can be resolved, so
    that nodes need not resolve each other's host names.

    Args:
        module: the module that workers run, followed by its arguments; None trains.
        meeting: the rendezvous file of a single node; None picks a new name.
    """
    line = [sys.executable, "-m", "torch.distributed.run"]
    line += [
        "--nnodes",
        job.nodes,
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        job.rendezvous_id if module is None else PREFLIGHT_ID,
    ]
    if job.rdzv_endpoint is None:
        line += ["--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(meeting or meeting_file())]
        line += ["--local-addr", LOOPBACK]
    else:
        settings = f"join_timeout={job.rdzv_timeout_s},read_timeout={job.rdzv_timeout_s}"
        line += ["--rdzv-conf", settings + (",is_host=true" if hosts_unrecognised(job.rdzv_endpoint) else "")]
        line += ["--rdzv-endpoint", job.rdzv_endpoint]
        address = local_address(job.rdzv_endpoint)
        if address is not None:
            line += ["--local-addr", address]
    line += ["--nproc-per-node", str(job.nproc_per_node), "--max-restarts", str(job.max_restarts)]
    return [*line, "-m", *(module or job.train_arguments)]


def environment(job: Job) -> dict[str, str]:
    """Variables that the workers need and that this process's environment does not set yet.

    They give each worker its share of the cores, each start its own store, and gloo and NCCL the network interface: the
    loopback on one node; on several, the interface towards the rendezvous, because gloo would otherwise use the address
    of the host's name, which is often the loopback's.
    """
    settings = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // job.nproc_per_node)),
        # Otherwise torchrun 2.13 keeps one store for all restarts. Restarted workers may then read their predecessors'
        # addresses from it, and their connections fail or hang until the timeout of the collective.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Set in the environment, because torchrun 2.11 of the CUDA requirements has no option for it (and waits 30 s).
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOPS_WITHIN_S),
    }
    if job.rdzv_endpoint is None:
        settings |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK_INTERFACE)
    address = local_address(job.rdzv_endpoint) if job.rdzv_endpoint is not None and job.nnodes > 1 else None
    for interface, addresses in psutil.net_if_addrs().items():
        if address is not None and address in {known.address for known in addresses}:
            settings["GLOO_SOCKET_IFNAME"] = interface
    return {name: value for name, value in settings.items() if name not in os.environ}


def command_line(job: Job) -> str:
    """`environment` and `command` as one line for a shell."""
    settings = [f"{name}={value}" for name, value in environment(job).items()]
    return " ".join([*settings, shlex.join(command(job))])


def run(job: Job, *, resumes: bool, module: list[str] | None = None, run_folder: Path | None = None) -> int:
    """Runs torchrun to its end and returns 0, 1 (the job failed), 2 (`USER_ERROR`) or 128 + the signal received.

    ``job.max_restarts`` limits restarts without progress. If the job has written a checkpoint to ``run_folder`` since
    torchrun started, torchrun starts again with the full number of restarts. ``resumes`` says whether restarted workers
    resume from a checkpoint.
    """
    if job.nnodes > 1:
        count = f"{job.fewest_nodes} to {job.nnodes}" if job.is_elastic else job.nnodes
        say(f"waiting for {count} nodes at {job.rdzv_endpoint}, at most {job.rdzv_timeout_s} s")
    while True:
        before = _newest_checkpoint(run_folder)
        status, watch = _run_once(job, resumes, module)
        reached = _newest_checkpoint(run_folder)
        if watch.alone or status != 1 or not resumes or not job.max_restarts or reached <= before:
            if status == 1 and resumes and job.nnodes > 1:
                say("to resume from the last complete checkpoint, run the same command on all nodes")
            return 1 if status == NO_RESTART else status
        say(f"the job has written a checkpoint at step {reached} since torchrun started: torchrun starts again")


def _newest_checkpoint(run_folder: Path | None) -> int:
    """The step of the run's newest complete checkpoint, or -1 if there is none."""
    found = run_folder.glob("checkpoints/step_*/index.json") if run_folder is not None else ()
    names = [path.parent.name.removeprefix("step_") for path in found]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=-1)


def _run_once(job: Job, resumes: bool, module: list[str] | None) -> tuple[int, _Watch]:
    meeting = meeting_file()
    process = subprocess.Popen(
        command(job, module, meeting),
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **environment(job)},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # In a new session Ctrl-C reaches torchrun only from here, and not a second time during its clean-up.
        start_new_session=True,
        # If this process dies, torchrun gets SIGTERM and stops the workers.
        preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),
    )
    stopping = _Stopping(process)
    before = {number: signal.signal(number, stopping.pass_on) for number in PASSED_ON}
    watch = _Watch(process, job, resumes, stopping)
    if job.nnodes > 1:
        threading.Thread(target=watch.give_up_without_workers, daemon=True).start()
    comparison = threading.Thread(target=watch.give_way_to_another_job, daemon=True)
    if job.nnodes > 1 and module is None:
        comparison.start()
    try:
        assert process.stderr is not None
        watch.follow(process.stderr)
        status = process.wait()
        if comparison.is_alive():
            comparison.join(IMPORT_WITHIN_S)  # an exit while it imports PyTorch could crash
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        meeting.unlink(missing_ok=True)
    if stopping.received is not None:
        return 128 + stopping.received, watch
    if watch.stopped_for is not None:
        return watch.stopped_for, watch  # not 1, for which `run` may start torchrun again
    if status < 0 and not watch.alone:
        say(f"torchrun was killed by signal {-status} ({signal.Signals(-status).name})")
    return 1 if status else 0, watch


class _Stopping:
    """Forwards the first signal received.

    SIGTERM goes to each worker once, and to torchrun only when none of them is alive any more, so that it starts no new ones.
    The scheduler may have sent SIGTERM to all processes of the job already, and torchrun abandons its workers if it gets a
    second one.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.received: int | None = None
        self._told: set[int] = set()
        self._killed: set[int] = set()

    def pass_on(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = number
        if number == signal.SIGTERM:
            threading.Thread(target=self._tell_workers, daemon=True).start()
        else:
            self.process.send_signal(number)

    def _tell_workers(self) -> None:
        deadline = time.monotonic() + KILLED_AFTER_S
        while self.process.poll() is None:
            with suppress(psutil.Error):
                if time.monotonic() > deadline:
                    self._kill(_living_workers(self.process.pid))
                living = _living_workers(self.process.pid)
                waits_for_some = any(worker.pid in self._told for worker in living) if self._told else bool(living)
                for process in living if waits_for_some else [psutil.Process(self.process.pid), *living]:
                    if process.pid not in self._told:
                        self._told.add(process.pid)
                        process.terminate()
            time.sleep(0.05)

    def _kill(self, workers: list[psutil.Process]) -> None:
        """Kills each worker once; one in a system call may still be listed for a while."""
        stuck = [worker for worker in workers if worker.pid not in self._killed]
        if stuck:
            say(f"killed {len(stuck)} worker(s) that did not stop within {KILLED_AFTER_S} s")
        for worker in stuck:
            self._killed.add(worker.pid)
            worker.kill()


def _living_workers(torchrun: int) -> list[psutil.Process]:
    workers = psutil.Process(torchrun).children()
    return [worker for worker in workers if worker.status() != psutil.STATUS_ZOMBIE]


@dataclass
class _Watch:
    """Reads torchrun's standard error: shows the workers' lines and interprets torchrun's own."""

    process: subprocess.Popen[str]
    job: Job
    resumes: bool
    stopping: _Stopping
    failures: int = 0
    alone: bool = False  # the other nodes did not join
    stopped_for: int | None = None  # the exit status of a worker after which nothing restarts
    error_shown: bool = False

    def follow(self, stream: IO[str]) -> None:
        for line in own_lines(stream, self._on_log_line):
            is_error = line.startswith("error: ")
            # While the job is being stopped, show only the first error line.
            if self.stopped_for is None or (is_error and not self.error_shown):
                sys.stderr.write(line)
                sys.stderr.flush()
            self.error_shown = self.error_shown or is_error
        if self.stopped_for == USER_ERROR and not self.error_shown:
            say("a worker rejected its input or configuration: see its log in output_dir")
        if self.stopped_for == NO_RESTART and not self.error_shown:
            say("a worker cannot write its files: the disk is full, or its log in output_dir gives another reason")

    def _on_log_line(self, line: str) -> None:
        if (not_met := NOT_MET.match(line)) and self.stopping.received is None and self.stopped_for is None:
            self.alone = not_met[1] == "Timeout"
            self._say_not_met(not_met[1])
        failed = WORKER_FAILED.search(line)
        if failed is None or self.stopped_for is not None:
            return
        status, local_rank = int(failed[1]), int(failed[2])
        # Another node of an elastic job was asked to stop: this one saved with it, and continues without it.
        goes_on = status == PREEMPTED and self.job.is_elastic
        is_final = status in (USER_ERROR, INTERRUPTED, PREEMPTED, NO_RESTART) and not goes_on
        if is_final or self.stopping.received is not None:
            self.stopped_for = status
            self.process.send_signal(signal.SIGTERM)
            return
        self.failures += 1
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was killed by signal {-status} ({signal.Signals(-status).name})"
        after = "no restart is left"
        if self.failures <= self.job.max_restarts:
            where = "resume from the last complete checkpoint" if self.resumes else "start from step 0"
            count = f"at least {self.job.fewest_nodes}" if self.job.is_elastic else f"all {self.job.nnodes}"
            nodes = f"once {count} nodes have joined, " if self.job.nnodes > 1 else ""
            after = f"{nodes}all workers restart and {where} (restart {self.failures} of {self.job.max_restarts})"
        say(f"worker {local_rank} of this node {ended}; {after}")

    def give_up_without_workers(self) -> None:
        """Kills torchrun after a long time without workers: on a node that is cut off it would wait forever."""
        limit_s, alive_at = 2 * self.job.rdzv_timeout_s + UNANSWERED_S, time.monotonic()
        while self.process.poll() is None:
            with suppress(psutil.Error):
                if _living_workers(self.process.pid):
                    alive_at = time.monotonic()
            if time.monotonic() - alive_at > limit_s:
                self.alone = True
                self._say_not_met("Connection")
                self.process.kill()
                return
            time.sleep(1)

    def give_way_to_another_job(self) -> None:
        """Ends torchrun if the node waits for others that were started with another job (`launcher.same_job`)."""
        line = other_job(self.job, self._is_past_meeting)
        if line is not None and self.stopping.received is None and self.stopped_for is None:
            self.stopped_for, self.error_shown = USER_ERROR, True
            print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
            self.process.send_signal(signal.SIGTERM)

    def _is_past_meeting(self) -> bool:
        """Whether the nodes have met, so that workers were started, or torchrun has ended."""
        with suppress(psutil.Error):
            return self.process.poll() is not None or bool(_living_workers(self.process.pid))
        return True

    def _say_not_met(self, why: str) -> None:
        endpoint, nodes = self.job.rdzv_endpoint, self.job.fewest_nodes
        ended = {
            "Timeout": f"fewer than {nodes} nodes joined at {endpoint} within {self.job.rdzv_timeout_s} s: a node is down, "
            "unreachable or not started",
            "Connection": f"the rendezvous at {endpoint} does not answer: its node is down, unreachable or has given up",
        }
        say(ended.get(why, f"the rendezvous at {endpoint} was closed: another node has given up; see its output"))
