"""Runs a job on this node through torchrun and says in one line what torchrun says in fifty.

Workers print to the terminal as they would alone. torchrun's own lines on standard error (its log, and the traceback
with which it ends whenever a worker failed) are read here: they tell which worker failed, and are not shown.
A worker that ends with status 2 met a mistake that only the user can mend: nothing is started again.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from launcher.job import Job, split_endpoint
from launcher.torchrun_output import LAST_WORDS, own_lines
from mme.errors import UserError, one_line
from mme.run.exit_status import NO_RESTART, PREEMPTED
from mme.run.preemption import signal_when_parent_dies

PREFLIGHT_ID = "mme-preflight"
LOOPBACK, LOOPBACK_INTERFACE = "127.0.0.1", "lo"
UNANSWERED_S = 30  # beyond the time that torchrun may take to connect to the rendezvous and then to wait for the nodes
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
USER_ERROR = 2
INTERRUPTED = 130
STOPS_WITHIN_S = 60  # what workers have, once asked, to write a checkpoint and exit
KILLED_AFTER_S = 53  # of these; a worker that is stuck has tried to leave by itself before (mme.run.preemption)

WORKER_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
NOT_MET = re.compile(re.escape(LAST_WORDS) + r"rendezvous\.api\.Rendezvous(\w+)Error")


def command(job: Job, module: list[str] | None = None, meeting: Path | None = None) -> list[str]:
    """torchrun's command line for this node; ``module``: what the workers run, with its arguments (default: training).

    One node meets itself in a file, ``meeting`` (default: a new one), and its workers talk over the loopback: torchrun's own store, which
    `--standalone` takes, would listen on every interface of the machine, and whoever reaches it can run code in the job.

    On several nodes the workers are told this node's address on the way to the rendezvous, where its host can be resolved:
    host names need not be known to the other nodes.
    """
    line = [sys.executable, "-m", "torch.distributed.run"]
    line += [
        "--nnodes",
        str(job.nnodes),
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
        line += ["--rdzv-conf", settings + (",is_host=true" if _hosts_unawares(job.rdzv_endpoint) else "")]
        line += ["--rdzv-endpoint", job.rdzv_endpoint]
        address = local_address(job.rdzv_endpoint)
        if address is not None:
            line += ["--local-addr", address]
    line += ["--nproc-per-node", str(job.nproc_per_node), "--max-restarts", str(job.max_restarts)]
    return [*line, "-m", *(module or job.train_arguments)]


def meeting_file() -> Path:
    """A file for the processes of one node, of a name that nobody can have taken before."""
    return Path(tempfile.gettempdir(), f"mme-rendezvous-{secrets.token_hex(16)}")


def environment(job: Job) -> dict[str, str]:
    """What the workers' environment has beyond this process's; what is set there already stays.

    Their share of the cores, a store for each start, and the network interface: the loopback on one node; on several the
    one towards the rendezvous, because gloo would otherwise take the address of the host's name, often the loopback's.
    """
    settings = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // job.nproc_per_node)),
        # Else torchrun (2.13) keeps one store for all restarts, and workers that start again may read in it where those
        # before them listened: they are refused there, or wait for as long as a collective may take.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # By the environment: torchrun 2.11, of the CUDA requirements, doesn't know the option and gives them 30 seconds.
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


def require_endpoint_given(job: Job) -> None:
    """Raises UserError where several nodes are to meet and none says where."""
    if job.rdzv_endpoint is not None:
        split_endpoint(job.rdzv_endpoint)
    elif job.nnodes > 1:
        raise UserError(f"--nnodes {job.nnodes} needs --rdzv-endpoint HOST:PORT, the same on every node")


def require_endpoint(job: Job) -> None:
    """Checks that the nodes can meet.

    Raises:
        UserError: no endpoint is given, or its port is taken on this machine.
        LaunchError: its host stays unknown.
    """
    require_endpoint_given(job)
    if job.rdzv_endpoint is None:
        return
    host, port = split_endpoint(job.rdzv_endpoint)
    address = _wait_for_address(host, port, job.rdzv_timeout_s)
    if _is_free(address) or not _is_here(address):
        return
    holder = _holder(port)
    # A node of the same job may have been started on this machine before.
    if job.nnodes > 1 and "torch.distributed.run" in holder and job.rdzv_endpoint in holder:
        return
    who = f" by `{shlex.join(holder)[:80]}`" if holder else ""
    raise UserError(
        f"--rdzv-endpoint {job.rdzv_endpoint}: port {port} is in use on this machine{who}, expected a free port"
    )


def local_address(endpoint: str) -> str | None:
    """This node's address on the way to the endpoint's host; None where the host cannot be resolved or reached."""
    host, port = split_endpoint(endpoint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket: chooses the route, sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def _hosts_unawares(endpoint: str) -> bool:
    """Whether the endpoint is this node's without torchrun seeing it, which looks up no more than the node's own name.

    Where torchrun sees it, it also copes with a second node of the job on this machine, so it is not told there.
    """
    address = local_address(endpoint)
    if address is None or ipaddress.ip_address(address).is_loopback:
        return False
    host, _ = split_endpoint(endpoint)
    return address in _addresses(host) - _addresses(socket.gethostname())


def _addresses(host: str) -> set[str]:
    """The addresses that a name stands for; none where it is unknown."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def run(job: Job, *, resumes: bool, module: list[str] | None = None, run_folder: Path | None = None) -> int:
    """Runs torchrun to its end and returns 0, 1 (the job failed), 2 (see `USER_ERROR`) or 128 + the signal received.

    When no restart is left but checkpoints have been written in ``run_folder`` since torchrun was started, it is started
    again: the restarts are for a job that does not get on, not for the deaths of a long one. ``resumes`` says whether
    workers that start again go on from a checkpoint.
    """
    if job.nnodes > 1:
        _say(f"waiting for {job.nnodes} nodes at {job.rdzv_endpoint}, at most {job.rdzv_timeout_s} s")
    while True:
        before = _newest_checkpoint(run_folder)
        status, watch = _run_once(job, resumes, module)
        reached = _newest_checkpoint(run_folder)
        if watch.alone or status != 1 or not resumes or not job.max_restarts or reached <= before:
            if status == 1 and resumes and job.nnodes > 1:
                _say("the same command on all nodes goes on from the last complete checkpoint")
            return 1 if status == NO_RESTART else status
        _say(f"the job got on to the checkpoint of step {reached} meanwhile: torchrun starts again")


def _newest_checkpoint(run_folder: Path | None) -> int:
    """The step of the newest complete checkpoint of a run; -1: none."""
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
        # A session of its own: Ctrl-C reaches torchrun once, from here, and not a second time in its clean-up.
        start_new_session=True,
        # torchrun, and by it the workers, are asked to stop where this process dies.
        preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),
    )
    stopping = _Stopping(process)
    before = {number: signal.signal(number, stopping.pass_on) for number in PASSED_ON}
    watch = _Watch(process, job, resumes, stopping)
    if job.nnodes > 1:
        threading.Thread(target=watch.give_up_without_workers, daemon=True).start()
    try:
        assert process.stderr is not None
        watch.follow(process.stderr)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        meeting.unlink(missing_ok=True)
    if stopping.received is not None:
        return 128 + stopping.received, watch
    if watch.stopped_for is not None:
        return watch.stopped_for, watch  # not 1, so that torchrun isn't started again
    if status < 0 and not watch.alone:
        _say(f"torchrun was killed by signal {-status} ({signal.Signals(-status).name})")
    return 1 if status else 0, watch


class _Stopping:
    """Passes the first signal received on.

    SIGTERM goes to each worker once: a scheduler may have sent it to all processes of the job already, and torchrun, told
    twice, would leave its workers behind. torchrun itself is told as soon as no worker is alive, before it starts new ones.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.received: int | None = None
        self._told: set[int] = set()

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
                if time.monotonic() > deadline and (stuck := _living_workers(self.process.pid)):
                    _say(f"killed {len(stuck)} of the workers, which did not stop within {KILLED_AFTER_S} s")
                    for process in stuck:
                        process.kill()
                for process in _living_workers(self.process.pid) or [psutil.Process(self.process.pid)]:
                    if process.pid not in self._told:
                        self._told.add(process.pid)
                        process.terminate()
            time.sleep(0.05)


def _living_workers(torchrun: int) -> list[psutil.Process]:
    workers = psutil.Process(torchrun).children()
    return [worker for worker in workers if worker.status() != psutil.STATUS_ZOMBIE]


class LaunchError(RuntimeError):
    """The job could not be started, for no mistake in what was asked."""


@dataclass
class _Watch:
    """Reads torchrun's standard error: shows what workers wrote, understands what torchrun wrote."""

    process: subprocess.Popen[str]
    job: Job
    resumes: bool
    stopping: _Stopping
    failures: int = 0
    alone: bool = False  # the other nodes did not come
    stopped_for: int | None = None  # the status of the worker for which nothing is started again
    error_shown: bool = False

    def follow(self, stream: IO[str]) -> None:
        for line in own_lines(stream, self._on_log_line):
            is_error = line.startswith("error: ")
            # Once all is being stopped only rank 0's one line is still wanted, if it has not been seen yet.
            if self.stopped_for is None or (is_error and not self.error_shown):
                sys.stderr.write(line)
                sys.stderr.flush()
            self.error_shown = self.error_shown or is_error
        if self.stopped_for == USER_ERROR and not self.error_shown:
            _say("a worker refused its input or configuration: its log in output_dir says why")
        if self.stopped_for == NO_RESTART and not self.error_shown:
            _say("a worker can't write its files: its disk is full, or its log in output_dir says why")

    def _on_log_line(self, line: str) -> None:
        if (not_met := NOT_MET.match(line)) and self.stopping.received is None and self.stopped_for is None:
            self.alone = not_met[1] == "Timeout"
            self._say_not_met(not_met[1])
        failed = WORKER_FAILED.search(line)
        if failed is None or self.stopped_for is not None:
            return
        status, local_rank = int(failed[1]), int(failed[2])
        if status in (USER_ERROR, INTERRUPTED, PREEMPTED, NO_RESTART) or self.stopping.received is not None:
            self.stopped_for = status
            self.process.send_signal(signal.SIGTERM)
            return
        self.failures += 1
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was killed by signal {-status} ({signal.Signals(-status).name})"
        after = "no restart is left"
        if self.failures <= self.job.max_restarts:
            where = "go on from the last complete checkpoint" if self.resumes else "begin anew"
            nodes = f"once all {self.job.nnodes} nodes are there, " if self.job.nnodes > 1 else ""
            after = f"{nodes}all workers start again and {where} (restart {self.failures} of {self.job.max_restarts})"
        _say(f"worker {local_rank} of this node {ended}; {after}")

    def give_up_without_workers(self) -> None:
        """Ends torchrun where it has long had no workers: on a node that is cut off it waits for an answer for ever."""
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

    def _say_not_met(self, why: str) -> None:
        endpoint, nodes = self.job.rdzv_endpoint, self.job.nnodes
        ended = {
            "Timeout": f"fewer than {nodes} nodes came to {endpoint} within {self.job.rdzv_timeout_s} s: a node is down, "
            "cut off, was not started, or was started with another configuration or data set",
            "Connection": f"the rendezvous at {endpoint} does not answer: its node is down, cut off or has given up",
        }
        _say(ended.get(why, f"the rendezvous at {endpoint} was closed: another node has given up, and says why"))


def _say(text: str) -> None:
    print(f"launcher: {one_line(text)}", file=sys.stderr, flush=True)


def _wait_for_address(host: str, port: int, patience_s: int) -> tuple[Any, ...]:
    """The address of the rendezvous: a cluster may know a node's name only some time after it has started."""
    deadline = time.monotonic() + patience_s
    waiting = False
    while True:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            if time.monotonic() > deadline:
                unknown = f"--rdzv-endpoint: host {host} is still unknown after {patience_s} s ({error.strerror})"
                raise LaunchError(unknown) from error
        if not waiting:
            _say(f"waiting for host {host} to become known, at most {patience_s} s")
        waiting = True
        time.sleep(1)


def _is_free(address: tuple[Any, ...]) -> bool:
    """Whether this machine could listen there; False also where the address is another machine's."""
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError:
            return False
    return True


def _is_here(address: tuple[Any, ...]) -> bool:
    family, kind, protocol, _, where = address
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.bind((where[0], 0, *where[2:]))
        except OSError:
            return False
    return True


def _holder(port: int) -> list[str]:
    """The command line of the process that listens on the port of this machine; empty where it can't be seen."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return psutil.Process(connection.pid).cmdline()
            except psutil.Error:
                continue
    return []
