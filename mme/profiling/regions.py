"""The parts of a training job that a profile distinguishes, and the marks of these parts in the code.

A mark costs two microseconds while no profile is recorded. The innermost mark counts: an exchange within the lookup is an
exchange. An operation of backward belongs to the part of its forward operation, so only the forward pass has marks
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
    "data": "waiting for the next batch, and its way to the device",
    "lookup": "negatives, distinct items, their rows of the tables, the views made of them",
    "exchange": "waiting for other ranks: collectives beside which this rank computes nothing",
    "attention": "the attention half of the blocks, with its norms and projections",
    "routing": "routers, the order of rows by expert, their way to the experts and back",
    "experts": "the experts, or the dense FFN",
    "loss": "scores, softmax, the routers' balance",
    "backward": "backward of a part, as “backward: part”; by itself: what autograd and DeepSpeed do beside",
    "optimizer": "the check and the limit of gradients, the steps of decoder, experts and tables",
    "checkpoint": "copying and handing over what a checkpoint holds",
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
