"""Batches assembled ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Element = TypeVar("Element")

_END = object()
_POLL_S = 0.1


def prefetch(source: Iterator[Element], ahead: int = 2) -> Iterator[Element]:
    """The elements of ``source``, up to ``ahead`` of them made before they are asked for.

    An exception in ``source`` is raised where its element would have come. Closing the iterator, or letting go of it,
    ends the thread.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=_POLL_S)
                return
            except queue.Full:  # the consumer is slower, or has gone: look at `stop` again
                continue

    def produce() -> None:
        try:
            for element in source:
                put((element, None))
                if stop.is_set():
                    return
            put((_END, None))
        except BaseException as error:  # raised again by the consumer
            put((_END, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            element, error = ready.get()
            if error is not None:
                raise error
            if element is _END:
                return
            yield element
    finally:
        stop.set()
        thread.join()
