"""Several hosts on one machine: network namespaces that are connected only by a bridge.

Each host has its own loopback, its own address and one cable (a veth pair) to a switch, a separate namespace with the
bridge in it. Nothing is added to the machine's own network. Needs root and `ip` (iproute2).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PREFIX = "mme-test-"  # followed by the id of the process that made the namespaces
NETWORK = "10.77.0"


@dataclass(frozen=True)
class Host:
    """One namespace of a group of hosts."""

    name: str
    address: str
    switch: str
    port: str  # the switch's end of the cable

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Runs a command on this host."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)

    def plug(self, state: str) -> None:
        """Unplugs the host's cable (``down``) or plugs it in (``up``)."""
        _ip("-n", self.switch, "link", "set", self.port, state)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Makes ``count`` hosts; at the end kills their processes and removes them.

    Raises:
        OSError, subprocess.CalledProcessError: namespaces can't be made here.
    """
    _remove_left_behind()
    mine = f"{PREFIX}{os.getpid()}-"
    switch = f"{mine}switch"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        made = []
        for number in range(count):
            host = Host(f"{mine}{number}", f"{NETWORK}.{number + 1}", switch, f"port{number}")
            _ip("netns", "add", host.name)
            cable = ["peer", "name", "eth0", "netns", host.name]
            _ip("-n", switch, "link", "add", host.port, "type", "veth", *cable)
            _ip("-n", switch, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", interface, "up")
            made.append(host)
        yield made
    finally:
        _remove([name for name in _namespaces() if name.startswith(mine)])


def why_not() -> str | None:
    """The reason why hosts cannot be made here; None if they can."""
    try:
        with hosts(1):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces cannot be made here: {said}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _namespaces() -> list[str]:
    with suppress(OSError):
        return [path.name for path in Path("/run/netns").iterdir()]
    return []


def _remove_left_behind() -> None:
    """Removes the hosts of test processes that were killed."""
    found = {name: name.removeprefix(PREFIX).split("-")[0] for name in _namespaces() if name.startswith(PREFIX)}
    _remove([name for name, maker in found.items() if maker.isdigit() and not psutil.pid_exists(int(maker))])


def _remove(names: list[str]) -> None:
    for name in names:
        for pid in _ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)
