"""Joins the process group and chooses device and backend: NCCL on GPUs if there are any, otherwise gloo on CPUs."""

from __future__ import annotations

import ctypes
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mme.data.loaders import Worker
from mme.errors import JobError, Preempted, UserError

PATIENCE_S = 600.0  # timeout of a collective
LEAVE_S = 0.3  # between the last collective and the destruction of the group
STORE_ANSWERS_WITHIN_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class World(Worker):
    """This process and its peers.

    ``store`` exchanges small values within the group outside collectives; any thread may use it.
    """

    store: dist.Store

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """A world of only this process, without a process group."""
        return cls(0, 1, device, dist.HashStore())

    def sum(self, values: Tensor) -> Tensor:
        """Sums ``values`` over the ranks in place, with bitwise equal results on all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Starts `sum`; the returned function waits for the result. Do not touch ``values`` before."""
        if self.size == 1:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return values

        return finish

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensor of each rank, in rank order; the tensors may differ in their first dimension."""
        if self.size == 1:
            return [values]
        lengths = [torch.empty(1, dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([values.shape[0]], device=values.device))
        longest = int(max(lengths))
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: values.shape[0]] = values
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded)
        return [rows[: int(length)] for rows, length in zip(received, lengths, strict=True)]

    def of_first(self, value: Any) -> Any:
        """Rank 0's ``value``, which must be small, on every rank."""
        if self.size > 1:
            dist.broadcast_object_list(values := [value], src=0)
            return values[0]
        return value

    def on_first(self, action: Callable[[], Any]) -> None:
        """Calls ``action`` on rank 0. All ranks raise its UserError, so that none of them waits for rank 0 and fails otherwise."""
        problem: UserError | None = None
        if self.rank == 0:
            try:
                action()
            except UserError as error:
                problem = error
        if problem := self.of_first(problem):
            raise problem

    def gather_objects(self, value: Any) -> list[Any]:
        """The ``value`` of each rank, which must be small, in rank order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(patience_s: float = PATIENCE_S, store: dist.Store | None = None) -> Iterator[World]:
    """Joins the group that torchrun describes in the environment, or forms a group of one.

    Args:
        patience_s: a collective raises if it waits longer.
        store: in which the processes find each other, if they share one already; None: see `group_store`.

    Raises:
        UserError: this node has more processes than GPUs.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it even in a group of one
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        processes, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > found:
            raise UserError(f"{processes} processes on a node with {found} GPUs: expected at least one GPU per process")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    # TorchRec also exchanges host tensors, so the group needs gloo in addition to NCCL.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    patience = timedelta(seconds=patience_s)
    if store is None:
        store = group_store(rank, size, patience)
    # With device_id NCCL connects here instead of in the first collective.
    dist.init_process_group(
        backend, rank=rank, world_size=size, store=store, timeout=patience, device_id=device if on_gpu else None
    )
    import deepspeed  # reads DS_ACCELERATOR when it is imported

    # Otherwise DeepSpeed compiles its own CPU collective at the first start, which needs a compiler, takes seconds and
    # leaves a lock behind if it is killed. gloo serves the CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    all_here = False
    try:
        yield World(rank, size, device, _own_store(size))
        all_here = True
    except (JobError, Preempted):
        all_here = True
        raise
    finally:
        if all_here:
            # gloo's threads release the tensors of the last collective after it has ended, and need Python's lock for
            # that. A process that exits immediately would abort ("terminate called without an active exception"). Nothing
            # signals when they are done, so wait.
            dist.barrier()
            time.sleep(LEAVE_S)
        deepspeed.comm.destroy_process_group()  # and DeepSpeed's groups: a later job in this process makes its own


def group_store(rank: int, size: int, patience: timedelta) -> dist.Store | None:
    """The store in which the processes find each other; None for the one that torchrun's environment describes.

    That one would listen on every interface of the machine. If its address is the loopback's, all processes are on this
    machine, and this store listens only on the loopback.
    """
    if size == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if address not in LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank:
        return dist.TCPStore(address, port, size, is_master=False, timeout=patience)
    listener = socket.create_server((address, port), backlog=size)
    return dist.TCPStore(address, port, size, is_master=True, timeout=patience, master_listen_fd=listener.detach())


def _own_store(size: int) -> dist.Store:
    """A store over a separate connection, with keys that no earlier attempt of the same job has used."""
    if size == 1:
        return dist.HashStore()
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=STORE_ANSWERS_WITHIN_S))
    return dist.PrefixStore(name[0], store)


def keep_freed_memory() -> None:
    """Makes glibc keep memory that tensors free instead of returning it to the kernel immediately.

    Each training step frees and reallocates hundreds of megabytes, and so does each batch of a server with a large
    catalogue; page faults for them take up to half of the time on a CPU. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 64 * 2**20)
