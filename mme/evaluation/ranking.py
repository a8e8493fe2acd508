"""Exact ranking of the whole catalogue with sharded tables.

Each rank has the vectors of its share of the items and scores them for the histories of all ranks. Only states, target
scores, counts and the best few items are exchanged. Items with equal scores rank in the order of their index, so the
result does not depend on the number of processes.

Legend: B histories of one rank's batch, U histories of all ranks, D total width, S items of a rank's share.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mme.data.batch import SequenceBatch
from mme.distributed.world import World
from mme.errors import NonFiniteError
from mme.evaluation.metrics import UNRANKED
from mme.model.catalogue import VectorCatalogue
from mme.model.encoder import Encoder
from mme.model.scoring import normalize_views

SCORES_AT_ONCE = 32_000_000  # elements of a score matrix
LEAST_BLOCK = 16  # columns; smaller blocks save nothing


@dataclass(frozen=True)
class GatheredHistories:
    """The histories of all ranks in rank order: normalised ``states`` (U, D), and the items that must not be ranked,
    ``excluded`` (n,) int64, with ``history_of`` (n,), the history that each belongs to."""

    states: Tensor
    excluded: Tensor
    history_of: Tensor


class Ranker:
    """Ranks the catalogue by the current tables; a new Ranker is needed after they change. Each call is a collective.

    Raises:
        NonFiniteError: an item's vector or, in each method, a history's state is not finite. No comparison with NaN is
            true, so every target would rank first.
    """

    def __init__(self, encoder: Encoder) -> None:
        assert isinstance(encoder.world, World)
        self.encoder, self.world = encoder, encoder.world
        self.catalogue = encoder.catalogue()
        shares = self.world.gather(torch.tensor([self.catalogue.num_items], device=self.world.device))
        self._at_once = max(1, SCORES_AT_ONCE // int(max(shares)))  # histories, the same number on every rank
        self._require_finite_vectors()

    def target_ranks(self, batch: SequenceBatch, excluded: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
        """1 + the number of ranked items with a higher score than the target, or with the same score and a smaller index.

        Args:
            batch: B histories.
            excluded: (n,) int64, the items that must not be ranked for each history, with ``offsets`` (B + 1,).
            targets: (B,) int64.

        Returns:
            (U,) int64 ranks for the histories of all ranks, in rank order, the same on every rank; `UNRANKED` for a target
            that is excluded.
        """
        histories = self._gather(batch, excluded, offsets)
        return self._ranks(histories, torch.cat(self.world.gather(targets)))

    def target_ranks_by_view(self, batch: SequenceBatch, excluded: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
        """(M + 1, U) int64: `target_ranks` by the share of each view in the scores and, in the last row, by all views."""
        histories = self._gather(batch, excluded, offsets)
        targets = torch.cat(self.world.gather(targets))
        views = [*range(self.encoder.config.model.num_tables), None]
        return torch.stack([self._ranks(histories, targets, view) for view in views])

    def _ranks(self, histories: GatheredHistories, targets: Tensor, view: int | None = None) -> Tensor:
        """(U,) ranks of the targets of all ranks; ``view``: by only the share of one view in the scores."""
        parts = self._parts(histories)
        ranks = torch.cat([targets[:0], *[self._ranks_of_part(histories, part, targets[part], view) for part in parts]])
        is_excluded = torch.zeros_like(targets, dtype=torch.bool)
        is_excluded[histories.history_of[histories.excluded == targets[histories.history_of]]] = True
        return ranks.masked_fill(is_excluded, UNRANKED)

    def _ranks_of_part(self, histories: GatheredHistories, part: slice, targets: Tensor, view: int | None) -> Tensor:
        """(u,) ranks of the targets of the histories ``part`` without regard to whether they are excluded."""
        scores = self._scores(histories, part, view)
        column = targets - self.catalogue.first_item
        row = ((column >= 0) & (column < self.catalogue.num_items)).nonzero().flatten()
        target_scores = scores.new_zeros(scores.shape[0])
        target_scores[row] = scores[row, column[row]]
        target_scores = self.world.sum(target_scores)[:, None]
        above = scores == target_scores
        above &= torch.arange(scores.shape[1], device=column.device) < column[:, None]
        above |= scores > target_scores
        return 1 + self.world.sum(above.sum(1))

    def top_k(self, batch: SequenceBatch, excluded: Tensor, offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best items that are not excluded, (U, k), and their scores, (U, k), for all ranks' histories in rank order.

        If no item is left, the item is −1 and the score −inf.
        """
        return self._top_k(self._gather(batch, excluded, offsets), k)

    def nearest(self, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k other items that are most similar to each item, (n, k), and their similarities, (n, k), in descending order.

        The similarity is the product of two normalised vectors: a cosine, unless `model.score_norm` is none. If no item is
        left, the item is −1 and the similarity −inf. A collective.

        Args:
            ids: (n,) int64 items, the same on every rank.
        """
        vectors = normalize_views(self.encoder.lookup(ids), self.encoder.config.model.score_norm)
        return self._top_k(GatheredHistories(vectors, ids, torch.arange(ids.numel(), device=ids.device)), k)

    def _top_k(self, histories: GatheredHistories, k: int) -> tuple[Tensor, Tensor]:
        found = [self._top_k_of_part(histories, part, k) for part in self._parts(histories)]
        none = torch.empty(0, k, dtype=torch.int64, device=histories.states.device), histories.states.new_empty(0, k)
        items, values = zip(none, *found, strict=True)
        return torch.cat(items), torch.cat(values)

    def _top_k_of_part(self, histories: GatheredHistories, part: slice, k: int) -> tuple[Tensor, Tensor]:
        """`top_k` for the histories ``part``."""
        scores = self._scores(histories, part)
        best, column = _first_of_the_best(scores, min(k, scores.shape[1]))
        best = torch.cat(self.world.gather(best.T)).T  # candidates of all ranks, (u, ranks · k)
        candidate = torch.cat(self.world.gather((column + self.catalogue.first_item).T)).T
        order = torch.argsort(candidate, dim=1)  # equal scores in the order of the items
        best, candidate = best.gather(1, order), candidate.gather(1, order)
        best, order = torch.sort(F.pad(best, (0, k), value=-torch.inf), dim=1, descending=True, stable=True)
        candidate = F.pad(candidate, (0, k)).gather(1, order)
        return candidate[:, :k].where(best[:, :k] > -torch.inf, -1), best[:, :k]

    def states(self, batch: SequenceBatch) -> Tensor:
        """(U, D) the states of the histories of all ranks, in rank order."""
        states = torch.cat(self.world.gather(self.encoder.encode(batch)))
        self._require_finite_states(states, batch)
        return states

    def restricted_to(self, items: Tensor) -> Ranker:
        """A Ranker of only these items, (n,) int64 ascending, numbered by their place among them; for a group of one process."""
        assert isinstance(self.catalogue, VectorCatalogue)
        restricted = copy.copy(self)
        restricted.catalogue = self.catalogue.at(items)
        return restricted

    def _gather(self, batch: SequenceBatch, excluded: Tensor, offsets: Tensor) -> GatheredHistories:
        counts = torch.cat(self.world.gather(offsets.diff()))
        history_of = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
        return GatheredHistories(self.states(batch), torch.cat(self.world.gather(excluded)), history_of)

    def _parts(self, histories: GatheredHistories) -> list[slice]:
        """The histories in parts whose scores fit into memory."""
        count = histories.states.shape[0]
        return [slice(start, min(start + self._at_once, count)) for start in range(0, count, self._at_once)]

    def _scores(self, histories: GatheredHistories, part: slice, view: int | None = None) -> Tensor:
        """(u, S) scores of this rank's share for the histories ``part``; −inf for items that are not ranked."""
        scores = self.catalogue.scores(histories.states[part], view)
        row, column = histories.history_of - part.start, histories.excluded - self.catalogue.first_item
        inside = (column >= 0) & (column < self.catalogue.num_items) & (row >= 0) & (row < scores.shape[0])
        scores[row[inside], column[inside]] = -torch.inf
        return scores

    def _require_finite_states(self, states: Tensor, batch: SequenceBatch) -> None:
        """``states`` are those of all ranks. If they and the vectors, each of length 1, are finite, so are the scores."""
        spoiled = states.isnan().any(1)
        if count := int(spoiled.sum()):
            first = int(torch.cat(self.world.gather(batch.user_rows.to(states.device)))[spoiled][0])
            raise NonFiniteError(
                f"the decoder's state is not finite for {count} of {spoiled.numel()} histories, the first that of row "
                f"{first}: the model has no valid scores"
            )

    def _require_finite_vectors(self) -> None:
        spoiled = self.catalogue.is_spoiled()
        if count := int(self.world.sum(spoiled.sum())):
            items = torch.cat(self.world.gather(spoiled.nonzero().flatten() + self.catalogue.first_item))
            item = int(items.min())
            views = self.encoder.lookup(torch.tensor([item], device=items.device))[0]
            of_view = views.square().sum(1).isfinite().tolist()
            table = of_view.index(False) if False in of_view else 0
            raise NonFiniteError(
                f"the item vectors are not finite for {count} of {self.encoder.num_items} items, the first that of "
                f"item {item} in table item_{table}: the model has no valid scores"
            )


def _first_of_the_best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row, (u, width), and their columns, both (u, k), with the first of equal ones.

    A wide row is searched in two steps. The k blocks of columns with the largest maxima, the first of equal ones, contain the
    result, because an item of any other block comes after at least one item of each of them. For a million columns that
    takes a third of the time of `topk`.
    """
    width = scores.shape[1]
    block = math.isqrt(width // max(k, 1))  # makes both steps equally wide
    if block < LEAST_BLOCK:
        return _first_of_the_best_in_one_step(scores, k)
    whole = width - width % block
    maxima = scores[:, :whole].unflatten(1, (-1, block)).amax(2)
    starts = _first_of_the_best_in_one_step(maxima, k)[1].sort(1).values * block
    columns = (starts[:, :, None] + torch.arange(block, device=scores.device)).flatten(1)
    rest = torch.arange(whole, width, device=scores.device).expand(scores.shape[0], -1)
    columns = torch.cat([columns, rest], dim=1)
    best, place = _first_of_the_best_in_one_step(scores.gather(1, columns), k)
    return best, columns.gather(1, place)


def _first_of_the_best_in_one_step(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `_first_of_the_best`. `topk` alone may return any of several equal scores."""
    width = scores.shape[1]
    best, column = scores.topk(k)
    if not k:
        return best, column
    last = best[:, -1:]
    is_last, equal = best == last, scores == last
    undecided = ((equal.sum(1) > is_last.sum(1)) & (last[:, 0] > -torch.inf)).nonzero().flatten()
    if undecided.numel():
        columns = torch.arange(width, dtype=torch.int32, device=scores.device)
        first = -torch.where(equal[undecided], -columns, -width).topk(k).values  # (rows, k), rising
        is_last = is_last[undecided]  # the equal ones are at the end
        place = (is_last.cumsum(1) - 1).clamp(min=0)
        column[undecided] = torch.where(is_last, first.gather(1, place).long(), column[undecided])
    return best, column
