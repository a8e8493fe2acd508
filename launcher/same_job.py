"""Detects that nodes at one endpoint were started with different jobs, and names a setting that differs.

Such nodes have different rendezvous ids, so torchrun would let both sides wait silently until the timeout. Each node
therefore publishes its settings in the rendezvous's store and compares them with those of the others.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from launcher.job import Job, split_endpoint
from mme.config import differing_keys

PATIENCE_S = 10.0  # time for this job's other nodes to join after another job has been seen
ANSWERS_WITHIN_S = 5.0
LOOK_EVERY_S = 0.5
COUNT, RECORD, TOLD = "mme/nodes", "mme/node/{}", "mme/told"  # keys of the store


def other_job(job: Job, has_met: Callable[[], bool]) -> str | None:
    """Blocks until the nodes have met according to ``has_met`` (None), or until another job blocks them (an error line)."""
    mine = {"id": job.rendezvous_id, "host": platform.node(), "settings": _as_json(job.settings)}
    store: Any = None
    others: list[dict[str, Any]] = []
    own = 0
    seen_at: float | None = None
    while not has_met():
        try:
            if store is None:
                store = _connect(job)
                store.set(RECORD.format(store.add(COUNT, 1)), json.dumps(mine))
            records = _records(store)
            others = [record for record in records if record["id"] != mine["id"]]
            own = len(records) - len(others)
            seen_at = (seen_at or time.monotonic()) if others and own < job.fewest_nodes else None
        except (RuntimeError, ValueError, KeyError, TypeError):
            store = None  # not started yet, or gone with its node after the others had been seen
        if seen_at is not None and time.monotonic() - seen_at > PATIENCE_S and not has_met():
            _wait_for_the_others(store, own + len(others))
            return _line(job, mine, others[0])
        time.sleep(LOOK_EVERY_S)
    return None


def _connect(job: Job) -> Any:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise torch warns about every failed connection
    from torch.distributed import TCPStore  # takes seconds to import, so only jobs on several nodes do it

    assert job.rdzv_endpoint is not None
    host, port = split_endpoint(job.rdzv_endpoint)
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWERS_WITHIN_S), wait_for_workers=False)


def _wait_for_the_others(store: Any, nodes: int) -> None:
    """Gives the other nodes time to find out too: the store ends with the node that holds it."""
    deadline = time.monotonic() + ANSWERS_WITHIN_S
    with suppress(RuntimeError, AttributeError):  # it is gone already
        told = store.add(TOLD, 1)
        while told < nodes and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            told = store.add(TOLD, 0)


def _records(store: Any) -> list[dict[str, Any]]:
    records = []
    for number in range(1, store.add(COUNT, 0) + 1):
        with suppress(KeyError):
            if store.check([RECORD.format(number)]):
                records.append(json.loads(store.get(RECORD.format(number))))
    return records


def _line(job: Job, mine: dict[str, Any], other: dict[str, Any]) -> str:
    keys = differing_keys(mine["settings"], other["settings"])
    key = keys[0]
    more = f" ({len(keys) - 1} more differ)" if len(keys) > 1 else ""
    return (
        f"--rdzv-endpoint {job.rdzv_endpoint}: another job was started there: {key} is {other['settings'].get(key)} on "
        f"{other['host']} and {mine['settings'].get(key)} on {mine['host']}{more}: expected the same configuration, data "
        "set and output_dir on every node, and an endpoint for each job"
    )


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as other nodes read them from JSON."""
    return json.loads(json.dumps(settings, default=str))
