"""Exact ranking of the whole catalogue with the tables still sharded.

Each rank holds the vectors of its share of the items and scores them for the histories of all ranks; only states,
target scores, counts and the best few items travel. Equal scores rank by item index, so every number of processes gives
the same result.

Legend: B histories of one rank's batch, U those of all ranks, D total width, S items of a rank's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mme.data.batch import SequenceBatch
from mme.distributed.recommender import Recommender

SCORES_AT_ONCE = 32_000_000  # elements of a score matrix


@dataclass(frozen=True)
class GatheredHistories:
    """The histories of all ranks in rank order: normalised ``states`` (U, D), and the items that must not be ranked,
    ``seen`` (n,) int64, with ``seen_by`` (n,) the history that each belongs to."""

    states: Tensor
    seen: Tensor
    seen_by: Tensor


class Ranker:
    """Ranks the catalogue as the tables stand now; made anew after they change. Each call is a collective."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.world = recommender.world
        self.first_item, vectors = recommender.catalogue()
        self.num_local = vectors.shape[0]
        # Shares of one width, so that all ranks cut the histories alike.
        width = -(-recommender.num_items // self.world.size)
        self.vectors = F.pad(vectors, (0, 0, 0, width - self.num_local))

    def target_ranks(self, batch: SequenceBatch, seen_ids: Tensor, seen_offsets: Tensor, targets: Tensor) -> Tensor:
        """1 + the number of unseen items that score higher than the target, or as high with a smaller index.

        Args:
            batch: B histories.
            seen_ids: (n,) int64, the items of each history that must not be ranked, with ``seen_offsets`` (B + 1,); the
                target itself is always ranked.
            targets: (B,) int64.

        Returns:
            (U,) int64 ranks for the histories of all ranks, in rank order, the same on every rank.
        """
        histories = self._gather(batch, seen_ids, seen_offsets)
        return self._ranks(histories, torch.cat(self.world.gather(targets)), slice(None))

    def target_ranks_by_view(
        self, batch: SequenceBatch, seen_ids: Tensor, seen_offsets: Tensor, targets: Tensor
    ) -> Tensor:
        """`target_ranks` by each view's share of the scores alone and, last, by all of them: (M + 1, U) int64."""
        histories = self._gather(batch, seen_ids, seen_offsets)
        targets = torch.cat(self.world.gather(targets))
        model = self.recommender.config.model
        views = [slice(start, start + model.view_dim) for start in range(0, model.embedding_dim, model.view_dim)]
        return torch.stack([self._ranks(histories, targets, of) for of in [*views, slice(None)]])

    def _ranks(self, histories: GatheredHistories, targets: Tensor, of: slice) -> Tensor:
        """(U,) ranks of the targets of all ranks by the components ``of`` the vectors alone."""
        columns = torch.arange(self.vectors.shape[0], device=targets.device)
        ranks = [targets[:0]]
        for part, scores in self._scores(histories, targets, of):
            target_column = (targets[part] - self.first_item)[:, None]
            own = columns == target_column
            target_scores = self.world.sum(scores.where(own, 0).sum(1))[:, None]
            above = (scores > target_scores) | ((scores == target_scores) & (columns < target_column))
            ranks.append(1 + self.world.sum(above.sum(1)))
        return torch.cat(ranks)

    def top_k(self, batch: SequenceBatch, seen_ids: Tensor, seen_offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best unseen items and their scores for the histories of all ranks, in rank order: both (U, k).

        Places that no item is left for hold item −1 and score −inf.
        """
        histories = self._gather(batch, seen_ids, seen_offsets)
        items = [torch.empty(0, k, dtype=torch.int64, device=histories.states.device)]
        values = [histories.states.new_empty(0, k)]
        for _, scores in self._scores(histories):
            best, column = _first_of_the_best(scores, min(k, scores.shape[1]))
            best = torch.cat(self.world.gather(best.T)).T  # candidates of all ranks, (u, ranks · 2k)
            candidate = torch.cat(self.world.gather((column + self.first_item).T)).T
            order = torch.argsort(candidate, dim=1)  # equal scores in the order of the items
            best, candidate = best.gather(1, order), candidate.gather(1, order)
            best, order = torch.sort(F.pad(best, (0, k), value=-torch.inf), dim=1, descending=True, stable=True)
            candidate = F.pad(candidate, (0, k)).gather(1, order)
            values.append(best[:, :k])
            items.append(candidate[:, :k].where(best[:, :k] > -torch.inf, -1))
        return torch.cat(items), torch.cat(values)

    def _gather(self, batch: SequenceBatch, seen_ids: Tensor, seen_offsets: Tensor) -> GatheredHistories:
        seen_counts = torch.cat(self.world.gather(seen_offsets.diff()))
        seen_by = torch.repeat_interleave(torch.arange(seen_counts.numel(), device=seen_counts.device), seen_counts)
        states = torch.cat(self.world.gather(self.recommender.encode(batch)))
        return GatheredHistories(states, torch.cat(self.world.gather(seen_ids)), seen_by)

    def _scores(
        self, histories: GatheredHistories, keep: Tensor | None = None, of: slice = slice(None)
    ) -> Iterator[tuple[slice, Tensor]]:
        """Scores (u, width) of this rank's share for a part of the histories; −inf where an item is not ranked.

        ``keep``: items that are ranked even where they were seen. ``of``: the components of the vectors that count.
        """
        excluded = histories.seen_by, histories.seen - self.first_item
        wanted = (excluded[1] >= 0) & (excluded[1] < self.num_local)
        if keep is not None:
            wanted &= histories.seen != keep[histories.seen_by]
        row, column = excluded[0][wanted], excluded[1][wanted]
        step = max(1, SCORES_AT_ONCE // self.vectors.shape[0])
        for start in range(0, histories.states.shape[0], step):
            part = slice(start, min(start + step, histories.states.shape[0]))
            scores = histories.states[part, of] @ self.vectors[:, of].T
            scores[:, self.num_local :] = -torch.inf
            inside = (row >= part.start) & (row < part.stop)
            scores[row[inside] - part.start, column[inside]] = -torch.inf
            yield part, scores


def _first_of_the_best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and columns, (u, 2k), among which are the k largest of each row, of equal ones those that stand first.

    `topk` alone takes any of the equal ones. The other places hold −inf.
    """
    width = scores.shape[1]
    best, column = scores.topk(k)
    last = best[:, -1:]
    columns = torch.arange(width, device=scores.device)
    first_equal = torch.where(scores == last, -columns, -width).topk(k).values
    values = [best.where(best > last, -torch.inf), last.where(first_equal > -width, -torch.inf)]
    return torch.cat(values, dim=1), torch.cat([column, -first_equal], dim=1)
