"""Closed-loop clients: each sends its next request when it has the answer to the last one.

They speak HTTP/1.1 over asyncio's streams and keep their connections. A general client would take more time per request than
the server that it measures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def measure(port: int, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[list[float], int]:
    """The milliseconds of each request that ``clients`` complete within ``seconds``, and the number of all requests, with
    those that are answered later.

    Raises:
        RuntimeError: an answer has another status than 200.
    """
    return asyncio.run(_measure(port, bodies, clients, seconds))


def ask(port: int, bodies: Sequence[bytes]) -> list[Any]:
    """The answers, parsed, one after another."""

    async def run() -> list[Any]:
        connection = await asyncio.open_connection("127.0.0.1", port)
        answers = [json.loads(await _exchange(connection, _request(body))) for body in bodies]
        connection[1].close()
        return answers

    return asyncio.run(run())


async def _measure(port: int, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[list[float], int]:
    requests = itertools.cycle([_request(body) for body in bodies])
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
    end = time.perf_counter() + seconds
    found = await asyncio.gather(*[_client(connection, requests, end) for connection in connections])
    for _, writer in connections:
        writer.close()
    return [elapsed for times, _ in found for elapsed in times], sum(number for _, number in found)


async def _client(connection: Connection, requests: Iterator[bytes], end: float) -> tuple[list[float], int]:
    times, number = [], 0
    while (start := time.perf_counter()) < end:
        await _exchange(connection, next(requests))
        finished, number = time.perf_counter(), number + 1
        if finished <= end:
            times.append(1e3 * (finished - start))
    return times, number


async def _exchange(connection: Connection, request: bytes) -> bytes:
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    body = await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{head.partition(b' ')[2][:3].decode()}: {body[:200].decode()}")
    return body


def _request(body: bytes) -> bytes:
    head = (
        f"POST /recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body
