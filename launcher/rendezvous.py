"""Where the nodes of a job meet: checks of the rendezvous endpoint and of this node's address."""

from __future__ import annotations

import ipaddress
import secrets
import shlex
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from launcher.job import Job, split_endpoint
from launcher.torchrun_output import say
from mme.errors import UserError


class LaunchError(RuntimeError):
    """The job could not start, although the input and the configuration are right."""


def meeting_file() -> Path:
    """A path for the rendezvous of one node's processes, with a name that nobody can guess."""
    return Path(tempfile.gettempdir(), f"mme-rendezvous-{secrets.token_hex(16)}")


def require_endpoint_given(job: Job) -> None:
    """Raises UserError if several nodes have no endpoint, or if the endpoint is malformed."""
    if job.rdzv_endpoint is not None:
        split_endpoint(job.rdzv_endpoint)
    elif job.nnodes > 1:
        raise UserError(f"--nnodes {job.nodes} needs --rdzv-endpoint HOST:PORT, the same on every node")


def require_endpoint(job: Job) -> None:
    """Checks that the nodes can meet.

    Raises:
        UserError: several nodes have no endpoint, the endpoint is malformed, or its port is in use on this machine.
        LaunchError: its host cannot be resolved in time.
    """
    require_endpoint_given(job)
    if job.rdzv_endpoint is None:
        return
    host, port = split_endpoint(job.rdzv_endpoint)
    address = _wait_for_address(host, port, job.rdzv_timeout_s)
    if _is_free(address) or not _is_here(address):
        return
    holder = _holder(port)
    # The port may belong to another node of the same job on this machine.
    if job.nnodes > 1 and "torch.distributed.run" in holder and job.rdzv_endpoint in holder:
        return
    who = f" by `{shlex.join(holder)[:80]}`" if holder else ""
    raise UserError(
        f"--rdzv-endpoint {job.rdzv_endpoint}: port {port} is in use on this machine{who}, expected a free port"
    )


def local_address(endpoint: str) -> str | None:
    """This node's address on the route to the endpoint's host; None if the host cannot be resolved or reached."""
    host, port = split_endpoint(endpoint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # on a datagram socket this chooses the route and sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def hosts_unrecognised(endpoint: str) -> bool:
    """Whether the endpoint is on this node but torchrun, which only resolves the node's own name, would not notice.

    If torchrun recognises its own endpoint, it also handles a second node of the job on this machine. Then the launcher must not
    set ``is_host``.
    """
    address = local_address(endpoint)
    if address is None or ipaddress.ip_address(address).is_loopback:
        return False
    host, _ = split_endpoint(endpoint)
    return address in _addresses(host) - _addresses(socket.gethostname())


def _addresses(host: str) -> set[str]:
    """The addresses of a host; none if its name cannot be resolved."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _wait_for_address(host: str, port: int, patience_s: int) -> tuple[Any, ...]:
    """The address of the rendezvous. A cluster may resolve a node's name only some time after the node has started."""
    deadline = time.monotonic() + patience_s
    waiting = False
    while True:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            if time.monotonic() > deadline:
                unknown = f"--rdzv-endpoint: host {host} cannot be resolved after {patience_s} s ({error.strerror})"
                raise LaunchError(unknown) from error
        if not waiting:
            say(f"waiting until host {host} can be resolved, at most {patience_s} s")
        waiting = True
        time.sleep(1)


def _is_free(address: tuple[Any, ...]) -> bool:
    """Whether this machine could listen at ``address``; False also if the address is another machine's."""
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
    """The command line of the process that listens on this machine's ``port``; empty if it cannot be read."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return psutil.Process(connection.pid).cmdline()
            except psutil.Error:
                continue
    return []
