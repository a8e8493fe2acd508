"""The parts of a training job that a profile distinguishes, and the functions that mark them in the code.

A mark costs two microseconds when no profile is recorded. The innermost mark counts: an exchange within the lookup counts as
an exchange. An operation of backward belongs to the part of its forward operation, so only the forward pass has marks
(`mme.profiling.trace`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.profiler import record_function

Element = TypeVar("Element")

REGIONS = {
    "data": "waiting for the next batch and copying it to the device",
    "lookup": "negatives, distinct items, their table rows and input views",
    "exchange": "waiting for other ranks in collectives that no computation hides",
    "attention": "the attention half of the blocks, with norms and projections",
    "routing": "routers, sorting rows by expert, dispatching and combining them",
    "experts": "the experts, or the dense FFN",
    "loss": "scores, softmax and the routers' balance losses",
    "backward": "“backward: part” is the backward of a part; “backward”, other work of autograd and DeepSpeed",
    "optimizer": "checking and clipping gradients, updating decoder, experts and tables",
    "checkpoint": "copying the state for a checkpoint",
    "evaluation": "ranking the validation split",
}
BACKWARD, EXCHANGE, OTHER = "backward", "exchange", "other"


@contextmanager
def region(name: str) -> Iterator[None]:
    """Marks code as the part ``name`` of `REGIONS`; a context manager or decorator."""
    if torch.autograd._profiler_enabled():
        with record_function(name):
            yield
    else:
        yield


def each_in_region(name: str, source: Iterable[Element]) -> Iterator[Element]:
    """Yields the elements of ``source`` and marks the wait for each."""
    elements, end = iter(source), object()
    while True:
        with region(name):
            element = next(elements, end)
        if element is end:
            return
        yield element  # type: ignore[misc]
