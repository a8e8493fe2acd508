"""Whole users with their ordered events, as arrays, and the steps that turn them into a training set.

Legend: U users, E their events, one user after another. Codes number the items: first those of a prior set in its order, then new
ones in the order of their raw ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mme.data.layout import FEATURE_PREFIX, FRACTIONS
from mme.data.parts import IntArray

BoolArray = NDArray[np.bool_]

NEW = -1


@dataclass(frozen=True)
class Histories:
    """
    Attributes:
        user_ids: (U,) raw ids.
        rows: (U,) int64, each user's row in the prior set; -1: none.
        offsets: (U + 1,) int64, the events of user u are offsets[u] to offsets[u + 1].
        codes: (E,) int32 items.
        times: (E,) int64 seconds, non-decreasing within a user.
        places: (E,) int64, for an event that the prior set left out, how many kept events of its user came before it;
            `NEW` if the prior set does not have the event.
        columns: further columns by their names in the parts, (E,) int32: the value indices of each feature and, if times are
            finer than a second, `FRACTIONS`, the nanoseconds beyond ``times``.
    """

    user_ids: pa.Array
    rows: IntArray
    offsets: IntArray
    codes: NDArray[np.int32]
    times: IntArray
    places: IntArray
    columns: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def users(self, begin: int, end: int) -> Histories:
        """Users number ``begin`` to ``end``."""
        events = slice(self.offsets[begin], self.offsets[end])
        return Histories(
            self.user_ids[begin:end],
            self.rows[begin:end],
            self.offsets[begin : end + 1] - self.offsets[begin],
            self.codes[events],
            self.times[events],
            self.places[events],
            {name: values[events] for name, values in self.columns.items()},
        )

    def select(self, kept: BoolArray) -> Histories:
        """The events for which ``kept`` (E,) is true, and the users that have any of them."""
        lengths = _sum_by_user(kept, self.offsets)
        users = lengths > 0
        return Histories(
            self.user_ids.filter(pa.array(users)),
            self.rows[users],
            np.append(0, np.cumsum(lengths[users])),
            self.codes[kept],
            self.times[kept],
            self.places[kept],
            {name: values[kept] for name, values in self.columns.items()},
        )

    def user_of_event(self) -> IntArray:
        return np.repeat(np.arange(self.rows.size), self.lengths)


def concatenate(pieces: Sequence[Histories]) -> Histories:
    """The users of several pieces, one piece after another."""
    ends = np.cumsum([0] + [piece.codes.size for piece in pieces])
    return Histories(
        pa.concat_arrays([piece.user_ids for piece in pieces]),
        np.concatenate([piece.rows for piece in pieces]),
        np.concatenate([[0], *(piece.offsets[1:] + end for piece, end in zip(pieces, ends[:-1], strict=True))]),
        np.concatenate([piece.codes for piece in pieces]),
        np.concatenate([piece.times for piece in pieces]),
        np.concatenate([piece.places for piece in pieces]),
        {name: np.concatenate([piece.columns[name] for piece in pieces]) for name in pieces[0].columns},
    )


def first_of_duplicates(histories: Histories) -> BoolArray:
    """(E,) whether each event is the first with the same user, item and time, at the resolution of the times."""
    user, times = histories.user_of_event(), histories.times
    kept = np.ones(times.size, bool)
    ties = (times[1:] == times[:-1]) & (user[1:] == user[:-1])
    if FRACTIONS in histories.columns:
        fractions = histories.columns[FRACTIONS]
        ties &= fractions[1:] == fractions[:-1]
    if not ties.any():
        return kept
    tied = np.flatnonzero(np.append(ties, False) | np.append(False, ties))
    group = np.cumsum(~np.append(False, ties))[tied]  # one number for each user and time
    order = np.lexsort((histories.codes[tied], group))  # stable, so that the first of equal events stays first
    item, group = histories.codes[tied][order], group[order]
    again = (item[1:] == item[:-1]) & (group[1:] == group[:-1])
    kept[tied[order[1:][again]]] = False
    return kept


@dataclass(frozen=True)
class CountFilter:
    """Drops users and items with too few events, but none of a prior set, because those had enough before.

    Attributes:
        iterate: repeat until all that remain have enough; otherwise count each once, over all events.
    """

    min_user_events: int
    min_item_events: int
    iterate: bool

    def keeps(self, histories: Histories, item_passes: BoolArray) -> BoolArray:
        """(E,) whether each event's user and item have enough; ``item_passes`` (items,)."""
        of_item = item_passes[histories.codes]
        counts = _sum_by_user(of_item, histories.offsets) if self.iterate else histories.lengths
        user_passes = (counts >= self.min_user_events) | (histories.rows >= 0)
        return of_item & np.repeat(user_passes, histories.lengths)

    def choose_items(
        self, spool: Spool, arriving: Iterable[Histories], num_items: int, num_prior: int
    ) -> tuple[BoolArray, IntArray]:
        """Which items pass, and how many kept events each has; ``arriving`` histories are also written to ``spool``.

        Each round takes the items that passed the last one and counts their events of users with enough events. Nothing
        about single users stays in memory.
        """
        passes = np.ones(num_items, bool)
        users_only = replace(self, min_user_events=self.min_user_events if self.iterate else 0)
        counts = users_only._count(spool.writing(arriving), passes)
        while self.min_item_events > 1:
            still = counts >= self.min_item_events
            still[:num_prior] = True
            settled = bool((still == passes).all())
            passes = still
            if settled or not self.iterate:
                break
            counts = self._count(spool.read(), passes)
        return passes, counts if self.iterate else self._count(spool.read(), passes)

    def _count(self, pieces: Iterable[Histories], item_passes: BoolArray) -> IntArray:
        counts = np.zeros(item_passes.size, np.int64)
        for histories in pieces:
            np.add.at(counts, histories.codes[self.keeps(histories, item_passes)], 1)
        return counts


def places_among(kept: BoolArray, histories: Histories) -> IntArray:
    """(E,) the number of kept events of the same user before each event."""
    before: IntArray = np.cumsum(kept) - kept
    return before - np.repeat(before[histories.offsets[:-1]], histories.lengths)


class Spool:
    """Histories in a file, which can be read several times in the order in which they were written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def writing(self, pieces: Iterable[Histories]) -> Iterator[Histories]:
        """Yields the pieces and writes each before it is yielded."""
        writer: pa.RecordBatchFileWriter | None = None
        try:
            for histories in pieces:
                batch = _to_batch(histories)
                writer = writer or pa.ipc.new_file(str(self.path), batch.schema)
                writer.write_batch(batch)
                yield histories
        finally:
            if writer is not None:
                writer.close()

    def read(self) -> Iterator[Histories]:
        """All pieces that were written."""
        if not self.path.exists():
            return
        # Not memory-mapped, because mapped pages would count as the process's memory.
        with pa.OSFile(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield _from_batch(reader.get_batch(number))


def _to_batch(histories: Histories) -> pa.RecordBatch:
    offsets = pa.array(histories.offsets)
    lists = {"codes": histories.codes, "times": histories.times, "places": histories.places, **histories.columns}
    return pa.record_batch(
        {
            "user_ids": histories.user_ids,
            "rows": pa.array(histories.rows),
            **{name: pa.LargeListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()},
        }
    )


def _from_batch(batch: pa.RecordBatch) -> Histories:
    return Histories(
        batch["user_ids"],
        batch["rows"].to_numpy(),
        batch["codes"].offsets.to_numpy(),
        batch["codes"].values.to_numpy(),
        batch["times"].values.to_numpy(),
        batch["places"].values.to_numpy(),
        {
            name: batch[name].values.to_numpy()
            for name in batch.schema.names
            if name == FRACTIONS or name.startswith(FEATURE_PREFIX)
        },
    )


def _sum_by_user(values: BoolArray, offsets: IntArray) -> IntArray:
    """(U,) how many of each user's ``values`` (E,) are true; every user has an event."""
    return np.add.reduceat(values, offsets[:-1], dtype=np.int64)
