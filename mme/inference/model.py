"""A trained model on one device, as returned by `mme.load`.

It needs no process group, TorchRec or DeepSpeed, and computes states, vectors and lists with the same code as evaluation.

Legend: B histories, n events in all histories, I items of the catalogue, D total embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import resolve_backend
from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.data.numbering import Numbering
from mme.data.parts import IntArray
from mme.errors import UserError, first_line
from mme.evaluation.ranking import Ranker
from mme.evaluation.request_batch import sequence_batch
from mme.evaluation.requests import Requests, Unknown, check_requests, concatenate, with_features
from mme.inference.item_index import FloatArray, ItemIndex
from mme.inference.local_encoder import LocalEncoder
from mme.inference.padded import PaddedEncoder
from mme.inference.requests import SOURCE, Answer, RecommendationRequest, as_table
from mme.model.catalogue import VectorCatalogue

HISTORIES_AT_ONCE = 256


@dataclass(frozen=True)
class Knowledge:
    """Facts about the training data that a model needs besides its weights.

    Attributes:
        numbering: the item, feature value or user of each row of the tables.
        counts: (I,) int64, number of events of each item.
        times: first and last time of the training data, in seconds.
    """

    numbering: Numbering
    counts: IntArray
    times: tuple[int, int]


class TrainedModel:
    """Recommends, scores and embeds.

    Args:
        name: the model's name for answers and messages.
        weights: whole tensors by name, see `mme.inference.weights.Checkpoint`.
        device: where to compute; None selects CUDA if available, otherwise the CPU.

    Raises:
        UserError: the weights do not fit the configuration and the data, or a kernel cannot run on the device.
        NonFiniteError: an item vector is not finite.
    """

    def __init__(
        self,
        config: Config,
        knowledge: Knowledge,
        weights: Mapping[str, Tensor],
        name: str,
        device: str | torch.device | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.knowledge = knowledge
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            resolve_backend(config.kernels.backend, self.device)
        except ValueError as error:
            raise UserError(f"kernels.backend: {error}") from error
        self._encoder = LocalEncoder(config, knowledge.numbering, weights, self.device)
        self._ranker = Ranker(self._encoder)
        assert isinstance(self._ranker.catalogue, VectorCatalogue)
        self._vectors = self._ranker.catalogue.vectors
        self._popular = np.argsort(-knowledge.counts, kind="stable")
        self._index: ItemIndex | None = None

    def use_index(self, path: Path) -> None:
        """Lets `recommend` search an index of the item vectors instead of scoring every item.

        Lists with candidates or with many excluded items remain exact.

        Raises:
            UserError: see `ItemIndex`.
        """
        self._index = ItemIndex(path, self.item_ids, self._vectors.cpu().numpy())

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def weights(self) -> dict[str, Tensor]:
        """Whole float32 tensors by name, such as `tables/item_0` and `decoder/blocks.0.uvqk`."""
        return self._encoder.weights()

    @property
    def item_ids(self) -> pa.Array:
        """Raw ids by item index."""
        return self.knowledge.numbering.item_ids

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Sequence[Any] | None = None,
        unknown: str = "skip",
        blocked: Sequence[Any] = (),
    ) -> pa.Table:
        """The best items for each history.

        Args:
            histories: see `as_table`: `item_ids` (list of raw ids, oldest first), `timestamps` (list of integer seconds),
                optional `user_id`, `request_timestamp` (integer seconds) and the features that the model reads.
            k: number of items per list.
            exclude_seen: exclude items of the history.
            candidates: raw ids of the only items to rank; None: all items.
            unknown: "skip" ignores events of items that the model does not know; "refuse" raises an error.
            blocked: raw ids of items that are never recommended.

        Returns:
            A table with `user_id` if it was given, `item_ids` (list of raw ids, best first), `scores` (list of float32) and
            `fallback` (bool): true if the history has no known item and the list contains the most popular items.

        Raises:
            UserError: a column, history, item or argument is wrong; the message names the row.
            NonFiniteError: a state is not finite.
        """
        if k < 1:
            raise UserError(f"k ({k}) must be at least 1")
        table = as_table(histories)
        request = RecommendationRequest(table, k, exclude_seen, candidates, blocked, _unknown(unknown))
        (answer,) = self.answer([request])
        if isinstance(answer, Exception):
            raise answer
        given = {"user_id": table["user_id"]} if "user_id" in table.column_names else {}
        raw = pa.list_(self.item_ids.type)
        return pa.table(
            {
                **given,
                "item_ids": pa.array(answer.item_ids, raw),
                "scores": pa.array(answer.scores, pa.list_(pa.float32())),
                "fallback": pa.array(answer.fallback, pa.bool_()),
            }
        )

    def user_embeddings(self, histories: Any) -> FloatArray:
        """(B, D) float32, the state of each history; its dot products with `item_embeddings` are the scores.

        Raises:
            UserError: see `recommend`; or a history has no known item.
        """
        return self._states(histories).cpu().numpy()

    def item_embeddings(self, ids: Sequence[Any] | None = None) -> FloatArray:
        """(I, D) float32 in the order of `item_ids`, or (len(ids), D) in the order of ``ids``.

        Raises:
            UserError: an id is unknown.
        """
        vectors = self._vectors
        chosen = vectors if ids is None else vectors[self._indices(ids, "ids")]
        return chosen.to("cpu", copy=True).numpy()  # the caller may change it

    def score(self, histories: Any, ids: Sequence[Any]) -> FloatArray:
        """(B, len(ids)) float32, the score of each item after each history, in the order of ``ids``.

        Raises:
            UserError: see `user_embeddings` and `item_embeddings`.
        """
        vectors = self._vectors[self._indices(ids, "ids")]
        return (self._states(histories) @ vectors.T).cpu().numpy()

    def padded_encoder(self) -> PaddedEncoder:
        """The encoder as a module over padded histories, for `torch.export`."""
        return self._encoder.padded()

    def answer(self, requests: Sequence[RecommendationRequest]) -> list[Answer | Exception]:
        """One answer per request, in order, or its `UserError`. Histories of all requests are encoded together."""
        answers: dict[int, Answer | Exception] = {}
        groups: dict[tuple[int, ...] | None, list[_Checked]] = {}
        for number, request in enumerate(requests):
            try:
                checked = self._check(number, request)
            except UserError as error:
                answers[number] = error
                continue
            groups.setdefault(checked.candidates, []).append(checked)
        for candidates, group in groups.items():
            answers.update(self._rank(group, candidates))
        return [answers[number] for number in range(len(requests))]

    def _check(self, number: int, request: RecommendationRequest) -> _Checked:
        given = self._requests(request.histories, request.unknown)
        candidates = None
        if request.candidates is not None:
            candidates = tuple(np.unique(self._known_indices(request.candidates, "candidates")).tolist())
        return _Checked(number, request, given, self._known_indices(request.blocked, "blocked"), candidates)

    def _requests(self, table: pa.Table, unknown: str) -> Requests:
        """The histories of a table with item indices, checked as `mme recommend` checks its file."""
        if "user_id" not in table.column_names:
            table = table.append_column("user_id", pa.nulls(table.num_rows))
        numbering = self.knowledge.numbering
        given = check_requests(table, SOURCE, numbering.items, self.knowledge.times, None, _unknown(unknown))
        return with_features(given, table, SOURCE, self.config.model, numbering)

    def _states(self, histories: Any) -> Tensor:
        """(B, D) states of histories, each with at least one known item."""
        return self.encode(self._requests(as_table(histories), "skip").of_known_items())

    def encode(self, known: Requests, rows: IntArray | None = None) -> Tensor:
        """(B, D) the state of each history in ``rows`` (None: all), of known items only.

        Raises:
            UserError: a history is empty.
        """
        rows = np.arange(known.lengths.size) if rows is None else rows
        empty = rows[known.lengths[rows] == 0]
        if empty.size:
            raise UserError(f"{SOURCE}: row {empty[0]}: has no known item, expected at least one")
        parts = np.split(rows, range(HISTORIES_AT_ONCE, rows.size, HISTORIES_AT_ONCE))
        batches = (sequence_batch(known, part, self.config)[0].to(self.device) for part in parts)
        return torch.cat([self._ranker.states(batch) for batch in batches])

    def _rank(self, group: list[_Checked], candidates: tuple[int, ...] | None) -> dict[int, Answer]:
        """The answers to requests with the same candidates, by the number of each request."""
        given = concatenate([checked.given for checked in group])
        known = given.of_known_items()
        owner = np.repeat(np.arange(len(group)), [checked.given.lengths.size for checked in group])
        k = max(checked.request.k for checked in group)
        items = np.full((owner.size, k), -1, np.int64)
        scores = np.zeros((owner.size, k), np.float32)
        rows = np.flatnonzero(known.lengths)
        for start in range(0, rows.size, HISTORIES_AT_ONCE):
            chosen = rows[start : start + HISTORIES_AT_ONCE]
            batch, seen, offsets = sequence_batch(known, chosen, self.config)
            excluded = [
                group[owner[row]].excluded(seen[first:last])
                for row, first, last in zip(chosen, offsets[:-1], offsets[1:], strict=True)
            ]
            items[chosen], scores[chosen] = self._top_k(batch.to(self.device), excluded, k, candidates)
        for row in np.flatnonzero(known.lengths == 0):
            best = self._most_popular(group[owner[row]])
            items[row, : best.size], scores[row, : best.size] = best, self.knowledge.counts[best]
        lost = given.lengths - known.lengths
        return {
            checked.number: self._answer(
                items[owner == n][:, : checked.request.k],
                scores[owner == n],
                (known.lengths == 0)[owner == n],
                int(lost[owner == n].sum()),
            )
            for n, checked in enumerate(group)
        }

    def _top_k(
        self, batch: SequenceBatch, excluded: list[Tensor], k: int, candidates: tuple[int, ...] | None
    ) -> tuple[IntArray, FloatArray]:
        """(B, k) item indices, −1 if no item is left, and scores."""
        if candidates == ():
            return np.full((len(excluded), k), -1, np.int64), np.zeros((len(excluded), k), np.float32)
        ranker, chosen = self._ranker, None
        if self._index is not None and candidates is None and self._index.can_exclude(max(map(len, excluded))):
            states = ranker.states(batch).cpu().numpy()
            return self._index.search(states, [items.numpy() for items in excluded], k)
        if candidates is not None:
            chosen = torch.tensor(candidates, dtype=torch.int64)
            ranker = ranker.restricted_to(chosen.to(self.device))
            excluded = [_places_in(chosen, items) for items in excluded]
        offsets = torch.tensor([0, *(len(items) for items in excluded)]).cumsum(0)
        found, values = ranker.top_k(batch, torch.cat(excluded).to(self.device), offsets.to(self.device), k)
        found = found.cpu()
        if chosen is not None:
            found = torch.where(found >= 0, chosen[found.clamp(min=0)], found)
        return found.numpy(), values.cpu().numpy()

    def _most_popular(self, checked: _Checked) -> IntArray:
        """The items with the most events among those that the request ranks."""
        allowed = np.ones(self.num_items, bool)
        if checked.candidates is not None:
            allowed[:] = False
            allowed[list(checked.candidates)] = True
        allowed[checked.blocked] = False
        ranked = self._popular[allowed[self._popular]]
        return ranked[: checked.request.k]

    def _answer(self, items: IntArray, scores: FloatArray, fallback: NDArray[np.bool_], lost: int) -> Answer:
        found = items >= 0
        lists = [self.item_ids.take(pa.array(row[here])).to_pylist() for row, here in zip(items, found, strict=True)]
        values = [row[: here.sum()].tolist() for row, here in zip(scores, found, strict=True)]
        return Answer(lists, values, fallback.tolist(), lost, self.name)

    def _indices(self, ids: Sequence[Any], what: str) -> IntArray:
        """Item indices of raw ids; raises UserError for one that is unknown."""
        found = self._find(ids, what)
        if (found < 0).any():
            unknown = list(ids)[int(np.argmax(found < 0))]
            raise UserError(
                f"{what}: item {unknown!r} is unknown: expected one of the {self.num_items:,} items of the training data"
            )
        return found

    def _known_indices(self, ids: Sequence[Any], what: str) -> IntArray:
        """Item indices of the raw ids that the model knows."""
        found = self._find(ids, what)
        return found[found >= 0]

    def _find(self, ids: Sequence[Any], what: str) -> IntArray:
        """Item indices of raw ids; −1 for one that is unknown."""
        try:
            return self.knowledge.numbering.items.find(pa.array(list(ids), self.item_ids.type))
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(f"{what}: expected raw item ids ({self.item_ids.type}): {first_line(error)}") from error


@dataclass(frozen=True)
class _Checked:
    """A valid request: its histories with item indices, its blocked items and its candidates."""

    number: int
    request: RecommendationRequest
    given: Requests
    blocked: IntArray
    candidates: tuple[int, ...] | None

    def excluded(self, seen: Tensor) -> Tensor:
        """The items to exclude from the list of a history whose items are ``seen``."""
        blocked = torch.from_numpy(self.blocked)
        return torch.cat([seen, blocked]) if self.request.exclude_seen else blocked


def _places_in(candidates: Tensor, items: Tensor) -> Tensor:
    """The positions, among the sorted candidates, of the items that are candidates."""
    return torch.searchsorted(candidates, items)[torch.isin(items, candidates)]


def _unknown(value: str) -> Unknown:
    if value not in ("skip", "refuse"):
        raise UserError(f"unknown ({value!r}) must be 'skip' or 'refuse'")
    return value  # type: ignore[return-value]
