"""Recommends the top-K items for histories in Parquet, by the item ids of the raw data.

Legend: B histories, k items of a list.
"""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mme.config import Config, load_run_config
from mme.data.description import read_info
from mme.data.numbering import Numbering, read_item_counts, read_titles
from mme.data.parts import IntArray, check_files
from mme.data.remote_set import local_folder
from mme.data.times import time_range
from mme.distributed.checkpoint import best_sound, load_weights
from mme.distributed.checkpoint_index import folder
from mme.distributed.recommender import Recommender
from mme.distributed.world import World, process_group
from mme.errors import UserError, first_line
from mme.evaluation.ranking import Ranker
from mme.evaluation.request_batch import sequence_batch
from mme.evaluation.requests import Requests, RequestTime, Unknown, check_requests, read_table, with_features
from mme.evaluation.seen import Seen
from mme.files import replacing
from mme.growth.known import known_extent


@dataclass(frozen=True)
class Options:
    """The options of `mme recommend`.

    Attributes:
        top_k: length of a list.
        seen: whether items of the history may be recommended; None: the run's `eval.seen`.
        unknown: whether events of items that are not in the training data are skipped or make the file invalid.
        request_time: see `check_requests`. Evaluation uses the time of the next event. A history's closest time is that of its
            last event; the time of a real request is better.
    """

    top_k: int = 10
    seen: Seen | None = None
    unknown: Unknown = "skip"
    request_time: RequestTime | None = None


@dataclass
class Summary:
    """Counts of histories and of skipped events.

    Attributes:
        histories: number of histories.
        unknown_events: events skipped because their item is unknown, in ``with_unknown`` histories.
        fallbacks: histories without any known item, which get the most popular items.
    """

    histories: int
    unknown_events: int = 0
    with_unknown: int = 0
    fallbacks: int = 0

    def notes(self) -> list[str]:
        """Lines for the user about unknown items and fallbacks."""
        lines = []
        if self.unknown_events:
            lines.append(
                f"events of items that the training data doesn't have: {self.unknown_events:,} left out, in "
                f"{self.with_unknown:,} of {self.histories:,} histories"
            )
        if self.fallbacks:
            lines.append(
                f"{self.fallbacks:,} histories have no known item: they get the most popular items (fallback is true)"
            )
        return lines


@dataclass
class Lists:
    """(B, k) item indices and scores; the index is −1 if no item is left."""

    items: IntArray
    scores: NDArray[np.float32] = field(repr=False)

    @classmethod
    def empty(cls, histories: int, k: int) -> Lists:
        return cls(np.full((histories, k), -1, np.int64), np.zeros((histories, k), np.float32))


def recommend(run: Path, users: Path, output: Path, options: Options) -> Summary:
    """Writes the best items of each history.

    Args:
        run: a run's folder; its best checkpoint is used.
        users: Parquet, see `mme.evaluation.requests.check_requests`. A column of `model.event_features` has a list with a
            value for each event. A column of `model.user_features` has one value, or such a list, of which the value of the
            first event in the model's window counts. A value that is missing or not in the training data counts as unknown.
        output: Parquet with `user_id`, `item_ids` (list of raw item ids, best first), `titles` (list of text or null, if
            the data set has titles), `scores` (list of float) and `fallback` (bool), published atomically. A history
            without a known item gets the most popular items; its `fallback` is true, and its scores are the numbers of
            events of the items in the data set.

    Raises:
        UserError: a file, column, row or item is missing, unknown or wrong, or ``output`` can't be written.
        NonFiniteError: the model has no valid scores.
    """
    config = load_run_config(run)
    with process_group() as world:
        _require_writable(output, world)
        data, model = local_folder(config.data.path), config.model
        info = read_info(data)
        check_files(data, info)
        index = best_sound(run, None, world)
        extent = known_extent(index.progress, folder(run, index.progress.step), data, info, model)
        numbering = Numbering.read(data, info, model.feature_columns).first(extent)
        table = read_table(users)
        given = check_requests(
            table, str(users), numbering.items, time_range(data, info), options.request_time, options.unknown
        )
        given = with_features(given, table, str(users), model, numbering)
        known = given.of_known_items()
        recommender = Recommender(config, extent.num_items, world, extent.feature_sizes, initialise_tables=False)
        load_weights(run, index, recommender)
        lists = _rank(recommender, config, known, options.top_k, options.seen or config.eval.seen)
        is_fallback = known.lengths == 0
        _fill_with_popular(lists, is_fallback, read_item_counts(data)[: extent.num_items])
        if world.rank == 0:
            _write(_result(given, lists, is_fallback, numbering.item_ids, read_titles(data)), output)
    unknown = given.lengths - known.lengths
    return Summary(is_fallback.size, int(unknown.sum()), int((unknown > 0).sum()), int(is_fallback.sum()))


def _rank(recommender: Recommender, config: Config, requests: Requests, top_k: int, seen: Seen) -> Lists:
    """Ranks items for the histories with a known item; the lists of the others stay empty."""
    world, ranker = recommender.world, Ranker(recommender)
    lists = Lists.empty(requests.lengths.size, top_k)
    rows = np.flatnonzero(requests.lengths)
    at_once = config.data.eval_batch_size * world.size
    for start in range(0, rows.size, at_once):
        chosen = rows[start : start + at_once]
        share = -(-chosen.size // world.size)
        batch, items_seen, offsets = sequence_batch(requests, chosen[world.rank * share :][:share], config)
        if seen == "include":
            items_seen, offsets = items_seen[:0], torch.zeros_like(offsets)
        items, scores = ranker.top_k(
            batch.to(world.device), items_seen.to(world.device), offsets.to(world.device), top_k
        )
        lists.items[chosen], lists.scores[chosen] = items.cpu().numpy(), scores.cpu().numpy()
    return lists


def _fill_with_popular(lists: Lists, chosen: NDArray[np.bool_], counts: IntArray) -> None:
    """Puts the most popular items into the ``chosen`` rows, (B,). These histories have no known item, so no item is seen.

    ``counts``: (num_items,) events of each item.
    """
    if not chosen.any():
        return
    best = np.argsort(-counts, kind="stable")[: lists.items.shape[1]]
    lists.items[chosen, : best.size], lists.scores[chosen, : best.size] = best, counts[best]


def _result(
    requests: Requests, lists: Lists, is_fallback: NDArray[np.bool_], catalogue: pa.Array, titles: pa.Array | None
) -> pa.Table:
    found = lists.items >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(found.sum(1))]), pa.int32())
    items = pa.array(lists.items[found])
    with_titles = {} if titles is None else {"titles": pa.ListArray.from_arrays(offsets, titles.take(items))}
    return pa.table(
        {
            "user_id": requests.user_ids,
            "item_ids": pa.ListArray.from_arrays(offsets, catalogue.take(items)),
            **with_titles,
            "scores": pa.ListArray.from_arrays(offsets, pa.array(lists.scores[found])),
            "fallback": is_fallback,
        }
    )


def _require_writable(output: Path, world: World) -> None:
    """Rejects an ``output`` that can't be written before the model is loaded; a collective."""
    problem = ""
    if world.rank == 0:
        try:
            if output.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=output.parent, prefix=".writable-"):
                pass
        except OSError as error:
            problem = f"--output {output}: {error.strerror or first_line(error)}: expected a file that can be written"
    if problem := world.of_first(problem):
        raise UserError(problem)


def _write(table: pa.Table, output: Path) -> None:
    with replacing(output) as partial:
        pq.write_table(table, partial)
