"""New events and a prior training set → the new one.

What the prior set kept stays: more events can only give more users and items enough company. So the new events are
filtered together with those that the prior set left out, and of its parts only those with a user among them are written
anew. Users keep their rows and items their indices; new ones come behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

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
) -> NDArray[np.int32]:
    """Writes the events that the filter keeps, with those of ``prior``, and those that it leaves out.

    ``item_passes`` and ``item_index`` (items,) tell of each code whether it is kept and its number in the set. Returns
    the codes of new events that ``prior`` had already.
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
            kept, begin = prior.part(part, first_row), 0
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
    """The users of ``kept``, a part of a prior set, with all their events in order.

    Legend: E events of the result. ``arriving`` are events of some of the users: those left out go back to their
    places, new ones behind all that are not younger; new ones that are there already are dropped.

    Returns:
        The histories; (E,) which of the events are kept now; the codes of those dropped.
    """
    user = np.repeat(arriving.rows - kept.rows[0], arriving.lengths)
    features = dict(kept.features)
    is_new = arriving.places == NEW
    back = ~is_new
    before = kept.offsets[user[back]] + arriving.places[back]
    users = np.insert(kept.user_of_event(), before, user[back])
    times = np.insert(kept.times, before, arriving.times[back])
    codes = np.insert(kept.codes, before, arriving.codes[back])
    stays = np.insert(np.ones(kept.codes.size, bool), before, arriving_kept[back])
    for name, values in features.items():
        features[name] = np.insert(values, before, arriving.features[name][back])
    # One number for user and time, by which both are in order: times are below 10^11, users of a part below 10^7.
    span = 1 + max(times.max(), arriving.times.max())
    after = np.searchsorted(users * span + times, user[is_new] * span + arriving.times[is_new], side="right")
    users = np.insert(users, after, user[is_new])
    for name, values in features.items():
        features[name] = np.insert(values, after, arriving.features[name][is_new])
    whole = Histories(
        kept.user_ids,
        kept.rows,
        np.append(0, np.cumsum(np.bincount(users, minlength=kept.rows.size))),
        np.insert(codes, after, arriving.codes[is_new]),
        np.insert(times, after, arriving.times[is_new]),
        np.full(users.size, NEW, np.int32),
        features,
    )
    stays = np.insert(stays, after, arriving_kept[is_new])
    first = first_of_duplicates(whole)
    return whole.select(first), stays[first], whole.codes[~first]


class _ByRow:
    """Histories in the order of their rows, those without a row at the end, taken step by step."""

    def __init__(self, pieces: Iterator[Histories]) -> None:
        self._pieces = pieces
        self._next: Histories | None = next(pieces, None)

    def below(self, end: int | None) -> Iterator[Histories]:
        """All that are left of rows below ``end``; None: with or without a row."""
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
    """(parts,) whether any user of a part gets an event, new or left out before; ``ends`` (parts,) of their rows."""
    touched = np.zeros(ends.size, bool)
    for histories in spool.read():
        changes = (histories.places == NEW) | count_filter.keeps(histories, item_passes)
        rows = histories.rows[np.add.reduceat(changes, histories.offsets[:-1], dtype=np.int64) > 0]
        touched[np.searchsorted(ends, rows[rows >= 0], side="right")] = True
    return touched


def _add(writer: DatasetWriter, histories: Histories, kept: BoolArray, item_index: IntArray) -> None:
    if kept.any():
        whole = histories if kept.all() else histories.select(kept)
        writer.add(whole.user_ids, whole.offsets, item_index[whole.codes], whole.times, whole.features)
