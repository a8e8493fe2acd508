"""Ports for the process groups of tests."""

from __future__ import annotations

import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # the kernel assigns these to sockets on demand


def free_port() -> int:
    """A port without a listener, outside the range that the kernel assigns."""
    first_ephemeral = int(EPHEMERAL.read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_ephemeral, 11_000))
        with socket.socket() as listener:
            if listener.connect_ex(("localhost", port)):
                return port
