"""The batches that requests are collected into."""

from __future__ import annotations

import asyncio
from typing import Any

from mme.serve.batching import Batcher

HOUR = 3600.0


class Request:
    num_histories = 1


def test_a_lone_request_does_not_wait_and_the_clients_of_a_shared_batch_are_waited_for() -> None:
    sizes: list[int] = []

    async def submit(batcher: Batcher, count: int) -> None:
        requests: list[Any] = [Request() for _ in range(count)]
        answers = await asyncio.wait_for(asyncio.gather(*[batcher.submit(each) for each in requests]), 30)
        assert answers == requests

    async def scenario() -> None:
        batcher = Batcher(lambda requests: list(requests), 3, HOUR, 100, sizes.append)
        serving = asyncio.create_task(batcher.run())
        await submit(batcher, 1)
        await submit(batcher, 1)
        await submit(batcher, 3)
        first = asyncio.create_task(submit(batcher, 2))  # waits for a third request
        await asyncio.sleep(0.1)
        assert not first.done() and sizes == [1, 1, 3]
        await submit(batcher, 1)
        await first
        serving.cancel()

    asyncio.run(scenario())
    assert sizes == [1, 1, 3, 3]
