"""Merges new events into a prior training set.

What the prior set kept stays, because more events can only let more users and items pass the count filters. New events are
filtered together with those that the prior set left out, and only the parts with users among them are rewritten. Users keep their
rows and items their indices; new ones are appended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mme.data.layout import FRACTIONS
from mme.prepare.histories import NEW, BoolArray, CountFilter, Histories, IntArray, Spool, first_of_duplicates
from mme.prepare.left_out import LeftOutWriter
from mme.prepare.prior import PriorSet
from mme.prepare.writer import DatasetWriter


def write_histories(
    spool: Spool,
    count_filter: CountFilter,
    item_passes: BoolArray,
    item_index: IntArray,
    prior: PriorSet | None,
    writer: DatasetWriter,
    left_out: LeftOutWriter,
    with_fractions: bool,
) -> NDArray[np.int32]:
    """Writes the events that the filter keeps, together with those of ``prior``, and separately the events that it leaves out.

    ``item_passes`` and ``item_index`` (items,) give for each code whether it is kept, and its number in the set;
    ``with_fractions``: the spooled histories have `FRACTIONS`. Returns the codes of the new events that ``prior`` already
    had.
    """
    pieces = _ByRow(spool.read())
    known: list[NDArray[np.int32]] = []
    if prior is not None:
        parts = prior.info["parts"]
        ends = np.cumsum([part["users"] for part in parts])
        touched = _touched_parts(spool, count_filter, item_passes, ends)
        for part, end, is_touched in zip(parts, ends.tolist(), touched, strict=True):
            first_row = end - part["users"]
            if not is_touched:
                writer.link(prior.folder / part["file"], part)
                for histories in pieces.below(end):
                    left_out.write(histories, np.ones(histories.codes.size, bool), histories.places)
                continue
            kept, begin = prior.part(part, first_row, with_fractions), 0
            for histories in pieces.below(end):
                last = int(histories.rows[-1]) + 1 - first_row
                stays = count_filter.keeps(histories, item_passes)
                whole, stays, again = merge(kept.users(begin, last), histories, stays)
                left_out.add(whole, stays)
                _add(writer, whole, stays, item_index)
                known.append(again)
                begin = last
            rest = kept.users(begin, kept.rows.size)
            _add(writer, rest, np.ones(rest.codes.size, bool), item_index)
    for histories in pieces.below(None):
        stays = count_filter.keeps(histories, item_passes)
        left_out.add(histories, stays)
        _add(writer, histories, stays, item_index)
    return np.concatenate([np.zeros(0, np.int32), *known])


def merge(
    kept: Histories, arriving: Histories, arriving_kept: BoolArray
) -> tuple[Histories, BoolArray, NDArray[np.int32]]:
    """Merges the users of ``kept``, a part of a prior set, with ``arriving`` events of some of them.

    Events that had been left out return to their places. New events follow all events that are not later, and are dropped if they
    exist already. Legend: E events of the result.

    Returns:
        The histories; (E,) whether each event is kept now; the codes of the dropped events.
    """
    user = np.repeat(arriving.rows - kept.rows[0], arriving.lengths)
    is_new = arriving.places == NEW
    back = ~is_new
    before = kept.offsets[user[back]] + arriving.places[back]

    def joined(values: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
        return np.append(np.insert(values, before, others[back]), others[is_new])

    users, times = joined(kept.user_of_event(), user), joined(kept.times, arriving.times)
    columns = {name: joined(values, arriving.columns[name]) for name, values in kept.columns.items()}
    order = _order(users, times, columns.get(FRACTIONS))
    whole = Histories(
        kept.user_ids,
        kept.rows,
        np.append(0, np.cumsum(np.bincount(users, minlength=kept.rows.size))),
        joined(kept.codes, arriving.codes)[order],
        times[order],
        np.full(users.size, NEW, np.int32),
        {name: values[order] for name, values in columns.items()},
    )
    stays = joined(np.ones(kept.codes.size, bool), arriving_kept)[order]
    first = first_of_duplicates(whole)
    return whole.select(first), stays[first], whole.codes[~first]


def _order(users: IntArray, times: IntArray, fractions: NDArray[np.int32] | None) -> IntArray:
    """The stable order by user, time and fraction."""
    if fractions is not None and fractions.any():
        return np.lexsort((fractions, times, users))
    # One number for user and time: times span less than 2 · 10^11 s, and a part has fewer than 10^7 users. A stable sort
    # of values that are sorted except for their end takes linear time.
    first = times.min()
    return np.argsort(users * (1 + times.max() - first) + (times - first), kind="stable")


class _ByRow:
    """Reads histories in the order of their rows; those without a row come last."""

    def __init__(self, pieces: Iterator[Histories]) -> None:
        self._pieces = pieces
        self._next: Histories | None = next(pieces, None)

    def below(self, end: int | None) -> Iterator[Histories]:
        """The next histories with rows below ``end``; None: all remaining ones, with or without a row."""
        while self._next is not None:
            piece = self._next
            number = piece.rows.size
            if end is not None:
                number = int(np.count_nonzero((piece.rows >= 0) & (piece.rows < end)))
            if number < piece.rows.size:
                self._next = piece.users(number, piece.rows.size)
                if number:
                    yield piece.users(0, number)
                return
            self._next = next(self._pieces, None)
            yield piece


def _touched_parts(spool: Spool, count_filter: CountFilter, item_passes: BoolArray, ends: IntArray) -> BoolArray:
    """(parts,) whether any user of a part gets an event, new or left out before; ``ends`` (parts,): the row after each part."""
    touched = np.zeros(ends.size, bool)
    for histories in spool.read():
        changes = (histories.places == NEW) | count_filter.keeps(histories, item_passes)
        rows = histories.rows[np.add.reduceat(changes, histories.offsets[:-1], dtype=np.int64) > 0]
        touched[np.searchsorted(ends, rows[rows >= 0], side="right")] = True
    return touched


def _add(writer: DatasetWriter, histories: Histories, kept: BoolArray, item_index: IntArray) -> None:
    if kept.any():
        whole = histories if kept.all() else histories.select(kept)
        writer.add(whole.user_ids, whole.offsets, item_index[whole.codes], whole.times, whole.columns)
