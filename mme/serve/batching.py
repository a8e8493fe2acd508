"""Collects the requests of many clients into batches for one model.

A request waits in a bounded queue. A task takes up to ``max_batch`` histories from it and ranks them in a worker thread, so that
the event loop keeps accepting requests. While one batch runs, the next one is collected. If the last batch had several requests,
the clients that it answered will soon ask again, so the next one waits for them, at most ``max_wait_s``; a lone client's request
does not wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mme.inference.requests import RecommendationRequest


class QueueFull(Exception):
    """The queue has no space for the request's histories."""


@dataclass
class _Waiting:
    request: RecommendationRequest
    answer: asyncio.Future[Any]


@dataclass
class Batcher:
    """A queue of requests and the task that ranks them in batches.

    Args:
        rank: ranks several requests at once; called in a thread, one call at a time.
        max_batch: maximum number of histories per call; a single request may have more.
        max_wait_s: time that the first request of a batch waits for others if the last batch had several.
        max_waiting: maximum number of waiting histories.
        observe: called with the number of histories of each batch.
    """

    rank: Callable[[list[RecommendationRequest]], list[Any]]
    max_batch: int
    max_wait_s: float
    max_waiting: int
    observe: Callable[[int], Any] = lambda size: None
    waiting: int = field(default=0, init=False)  # histories in the queue now

    def __post_init__(self) -> None:
        self._pending: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._is_shared = False  # whether the last batch had several requests

    async def submit(self, request: RecommendationRequest) -> Any:
        """The answer to one request.

        Raises:
            QueueFull: the queue has no space for the request.
            Exception: the error that ranking raised for this request.
        """
        if self.waiting + request.num_histories > self.max_waiting:
            raise QueueFull
        self.waiting += request.num_histories
        answer = asyncio.get_running_loop().create_future()
        self._pending.append(_Waiting(request, answer))
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        """Serves until cancelled."""
        while True:
            batch = await self._collect()
            self.waiting -= sum(entry.request.num_histories for entry in batch)
            batch = [entry for entry in batch if not entry.answer.cancelled()]
            if not batch:
                continue
            self.observe(sum(entry.request.num_histories for entry in batch))
            try:
                results = await asyncio.to_thread(self.rank, [entry.request for entry in batch])
            except Exception as error:
                results = [error] * len(batch)
            for entry, result in zip(batch, results, strict=True):
                if entry.answer.cancelled():
                    continue
                if isinstance(result, Exception):
                    entry.answer.set_exception(result)
                else:
                    entry.answer.set_result(result)

    async def _collect(self) -> list[_Waiting]:
        """Takes at least one request, and further ones that fit and arrive in time."""
        loop = asyncio.get_running_loop()
        batch: list[_Waiting] = []
        size, deadline = 0, 0.0
        while size < self.max_batch:
            if self._pending:
                following = self._pending[0].request.num_histories
                if batch and size + following > self.max_batch:
                    break
                if not batch:
                    deadline = loop.time() + (self.max_wait_s if self._is_shared else 0.0)
                batch.append(self._pending.popleft())
                size += following
                continue
            self._arrived.clear()
            patience = max(0.0, deadline - loop.time()) if batch else None
            try:
                await asyncio.wait_for(self._arrived.wait(), patience)
            except asyncio.TimeoutError:
                break
        self._is_shared = len(batch) > 1
        return batch
