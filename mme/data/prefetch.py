"""Prefetching: reader threads assemble batches and copy them to the device while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Element = TypeVar("Element")

AHEAD = 2  # elements that each reader makes ahead of the consumer


def prefetch(
    makers: Iterable[Callable[[], Element]], readers: int = 1, device: torch.device | None = None
) -> Generator[Element, None, None]:
    """Yields the elements that ``makers`` return, in the order of the makers for any number of threads.

    At most `AHEAD` elements per reader are waiting at any time. If a maker raises, its exception is raised in place of its
    element. The threads end when the iterator is closed or collected.

    Args:
        device: copy the elements to this device; they must have ``to`` and ``tensors`` like `SequenceBatch`. None: no copy.
    """
    copies = _Copies(device) if device is not None and device.type == "cuda" else None
    waiting: deque[Future[Any]] = deque()

    def take() -> Element:
        element = waiting.popleft().result()
        return copies.finish(*element) if copies else element

    with ThreadPoolExecutor(readers, thread_name_prefix="reader") as pool:
        try:
            for make in makers:
                waiting.append(pool.submit(copies.start, make) if copies else pool.submit(make))
                if len(waiting) > AHEAD * readers:
                    yield take()
            while waiting:
                yield take()
        finally:
            for future in waiting:
                future.cancel()


class _Copies:
    """Copies from pinned memory on a separate stream, so that no training kernel waits for a copy."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, make: Callable[[], Any]) -> tuple[Any, torch.cuda.Event]:
        """In a reader: makes an element and starts its copy; the event is recorded when the copy is done."""
        made = make()
        with torch.cuda.stream(self._stream):
            return made.to(self._device), self._stream.record_event()

    def finish(self, copied: Any, event: torch.cuda.Event) -> Any:
        """In the consumer: makes its stream wait for the copy."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        tensors: list[Tensor] = copied.tensors()
        for tensor in tensors:
            tensor.record_stream(
                stream
            )  # the copy stream must not reuse this memory before the consumer's work is done
        return copied
