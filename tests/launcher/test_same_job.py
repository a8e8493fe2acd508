"""Nodes that were started with different jobs at one endpoint are told which setting differs."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from launcher import same_job
from launcher.job import Job

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store, like the one that torchrun has at the rendezvous."""
    monkeypatch.setattr(same_job, "PATIENCE_S", 1.0)
    monkeypatch.setattr(same_job, "LOOK_EVERY_S", 0.05)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    yield f"127.0.0.1:{store.port}"
    del store


def job(endpoint: str, *overrides: str, nnodes: int = 2) -> Job:
    return Job(CONFIG, overrides, nnodes, 1, 3, endpoint)


def met_after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() > until


def what_nodes_say(jobs: list[Job], met_after_s: float = 60.0) -> list[str | None]:
    said: list[str | None] = [None] * len(jobs)

    def node(number: int) -> None:
        said[number] = same_job.other_job(jobs[number], met_after(met_after_s))

    threads = [threading.Thread(target=node, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def line(endpoint: str, key: str, other: object, mine: object, more: str = "") -> str:
    host = platform.node()
    return (
        f"--rdzv-endpoint {endpoint}: another job was started there: {key} is {other} on {host} and {mine} on {host}{more}: "
        "expected the same configuration, data set and output_dir on every node, and an endpoint for each job"
    )


def test_an_override_mistyped_on_one_node_is_named_on_both(endpoint: str) -> None:
    said = what_nodes_say([job(endpoint, "train.lr=0.004"), job(endpoint, "train.lr=0.04")])
    assert said == [line(endpoint, "train.lr", 0.04, 0.004), line(endpoint, "train.lr", 0.004, 0.04)]


def test_two_jobs_at_one_endpoint_are_told_apart_by_their_folders(endpoint: str) -> None:
    one, two = job(endpoint, "output_dir=one", "train.seed=1"), job(endpoint, "output_dir=two", "train.seed=2")
    assert what_nodes_say([one, two])[0] in {
        line(endpoint, key, other, mine, " (1 more differ)")
        for key, other, mine in (("train.seed", 2, 1), ("output_dir", "two", "one"))
    }


def test_a_job_whose_nodes_are_all_there_goes_on_beside_another(endpoint: str) -> None:
    whole, late = job(endpoint), job(endpoint, "train.lr=0.04")
    said = what_nodes_say([whole, whole, late], met_after_s=5.0)
    assert said[:2] == [None, None]
    assert said[2] == line(endpoint, "train.lr", 0.004, 0.04)


def test_nodes_of_one_job_are_left_alone(endpoint: str) -> None:
    assert what_nodes_say([job(endpoint), job(endpoint)], met_after_s=2.0) == [None, None]
