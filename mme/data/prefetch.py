"""Batches made ahead: assembled by reader threads, copied to the device beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Element = TypeVar("Element")

AHEAD = 2  # elements a reader makes that nobody has asked for yet


def prefetch(
    makers: Iterable[Callable[[], Element]], readers: int = 1, device: torch.device | None = None
) -> Generator[Element, None, None]:
    """What each of ``makers`` makes, in their order, whatever the number of threads that make them.

    At most `AHEAD` elements a reader wait to be taken. An exception of a maker is raised where its element would have
    come. Closing the iterator, or letting go of it, ends the threads.

    Args:
        device: where the elements are wanted, which then have ``to`` and ``tensors`` as a `SequenceBatch` has; None:
            where they are made.
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
    """Copies from pinned memory on a stream of their own, so that no kernel of the training waits for one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, make: Callable[[], Any]) -> tuple[Any, torch.cuda.Event]:
        """In a reader: makes an element and begins its copy; the event tells when that is done."""
        made = make()
        with torch.cuda.stream(self._stream):
            return made.to(self._device), self._stream.record_event()

    def finish(self, copied: Any, event: torch.cuda.Event) -> Any:
        """In the consumer: what its stream does from here on finds the copy done."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        tensors: list[Tensor] = copied.tensors()
        for tensor in tensors:
            tensor.record_stream(stream)  # its memory goes back to the other stream's pool only after this one's use
        return copied
