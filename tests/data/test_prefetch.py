"""Prefetched elements arrive in order and in bounded number, and errors are raised in their place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from mme.data.batch import SequenceBatch
from mme.data.prefetch import AHEAD, prefetch
from mme.errors import UserError


def readers_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_order_is_that_of_the_makers(readers: int) -> None:
    """Also if the first of every three takes longest."""

    def make(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number

    assert list(prefetch((partial(make, number) for number in range(20)), readers)) == list(range(20))
    assert not readers_alive()


@pytest.mark.parametrize("readers", [1, 3])
def test_no_more_wait_than_allowed(readers: int) -> None:
    made: list[int] = []
    elements = prefetch((partial(made.append, number) for number in range(1000)), readers)
    for taken in range(1, 50):
        next(elements)
        assert len(made) <= taken + AHEAD * readers
    elements.close()
    assert not readers_alive()


def test_an_error_is_raised_in_its_place_and_ends_the_readers() -> None:
    def makers() -> Iterator[Callable[[], int]]:
        yield lambda: 1
        yield lambda: int("no number")
        yield lambda: 3

    elements = prefetch(makers(), readers=2)
    assert next(elements) == 1
    with pytest.raises(ValueError, match="no number"):
        next(elements)
    assert not readers_alive()


def test_a_reader_that_is_told_to_exit_ends_the_iterator() -> None:
    def dies() -> int:
        raise SystemExit("gone")

    with pytest.raises(SystemExit, match="gone"):
        list(prefetch([lambda: 1, dies]))


def test_an_error_of_the_source_is_raised() -> None:
    def makers() -> Iterator[Callable[[], int]]:
        yield lambda: 1
        raise UserError("a bad row")

    with pytest.raises(UserError, match="a bad row"):
        list(prefetch(makers()))
    assert not readers_alive()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies use a separate stream")
def test_copies_to_a_gpu_are_complete_before_use() -> None:
    device = torch.device("cuda")

    def make(number: int) -> SequenceBatch:
        tokens = torch.full((1 << 20,), number)
        return SequenceBatch(tokens, torch.tensor([0, 1 << 20]), tokens, tokens, torch.tensor([number]))

    for number, batch in enumerate(prefetch((partial(make, n) for n in range(20)), 2, device)):
        assert all(tensor.device.type == "cuda" for tensor in batch.tensors())
        assert (batch.item_ids == number).all() and batch.user_rows.tolist() == [number]
