"""Runs a function on several processes that form one gloo group."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from mme.distributed.world import process_group
from tests.ports import free_port


def run_on(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs ``function(world, *args)`` on each of ``world_size`` processes; returns the results in rank order.

    Raises:
        AssertionError: with the traceback of the first process that failed.
    """
    context = mp.get_context("forkserver")
    results: Any = context.Queue()
    port = free_port()
    workers = [
        context.Process(target=_work, args=(rank, world_size, port, function, args, results))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    received = dict(pickle.loads(results.get(timeout=300)) for _ in workers)
    for worker in workers:
        worker.join()
    for rank, (ok, value) in received.items():  # in the order of arrival, because the first failure is the cause
        assert ok, f"rank {rank} of {world_size}:\n{value}"
    return [received[rank][1] for rank in range(world_size)]


def _work(rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        with process_group() as world:
            answer = pickle.dumps(
                (rank, (True, function(world, *args)))
            )  # by value, so that tensors outlive their process
    except BaseException:
        answer = pickle.dumps((rank, (False, traceback.format_exc())))
    results.put(answer)
