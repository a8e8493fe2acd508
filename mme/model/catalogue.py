"""A rank's share of the items, as a ranking scores it: normalised vectors, or the tables' rows where they are.

Legend: S items of the share, M views, d view width, D = M·d, u histories.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mme.model.scoring import EPS

ITEMS_AT_ONCE = 4_096  # so that their normalised vectors are still in a core's cache when they are multiplied


class Catalogue(ABC):
    """The items from ``first_item`` on, ``num_items`` in number."""

    first_item: int
    num_items: int

    @abstractmethod
    def scores(self, states: Tensor, view: int | None = None) -> Tensor:
        """(u, S) scores of the items for normalised states (u, D); ``view``: only the share of one view in them.

        The result may be overwritten by the next call.
        """

    @abstractmethod
    def is_spoiled(self) -> Tensor:
        """(S,) bool, whether an item's row is not finite or too large to be normalised."""


class VectorCatalogue(Catalogue):
    """Normalised vectors (S, D) of M views, which are NaN for a spoiled row."""

    def __init__(self, first_item: int, vectors: Tensor, num_views: int) -> None:
        self.first_item, self.num_items = first_item, vectors.shape[0]
        self.vectors, self.num_views = vectors, num_views

    def scores(self, states: Tensor, view: int | None = None) -> Tensor:
        if view is None:
            return states @ self.vectors.T
        return states.chunk(self.num_views, 1)[view] @ self.vectors.chunk(self.num_views, 1)[view].T

    def is_spoiled(self) -> Tensor:
        return torch.cat([part.isnan().any(1) for part in self.vectors.split(ITEMS_AT_ONCE)])

    def at(self, places: Tensor) -> VectorCatalogue:
        """Only the items at these places, (n,) int64, numbered from 0."""
        return VectorCatalogue(0, self.vectors[places], self.num_views)


class TableCatalogue(Catalogue):
    """Rows of M tables, M × (S, d), which stay where they are: only a few of them at a time are normalised.

    Args:
        tables: views of the tables, of any floating-point type.
        score_norm: see `mme.model.scoring.normalize_views`.
    """

    def __init__(self, first_item: int, tables: Sequence[Tensor], score_norm: str) -> None:
        self.first_item, self.num_items, self.tables = first_item, tables[0].shape[0], tables
        self.per_view, self.normalised = score_norm == "per_view", score_norm != "none"
        self._buffer = torch.empty(0, device=tables[0].device)  # the heap would grow by new scores of each part
        # (M, S), or (1, S) for all views together. NaN if a length is not finite, so that the scores are NaN too.
        self.factors = torch.cat([self._factors(of) for of in self._blocks()], dim=-1)

    def scores(self, states: Tensor, view: int | None = None) -> Tensor:
        views = range(len(self.tables)) if view is None else [view]
        states = torch.cat([states.chunk(len(self.tables), 1)[number] for number in views], dim=1)
        size = states.shape[0] * self.num_items
        if self._buffer.numel() < size:
            self._buffer = states.new_empty(size)
        scores = self._buffer[:size].view(states.shape[0], self.num_items)
        for block in self._blocks():
            vectors = torch.cat([self._vectors(number, block) for number in views], dim=1)
            torch.mm(states, vectors.to(states.dtype).T, out=scores[:, block])
        return scores

    def _vectors(self, view: int, block: slice) -> Tensor:
        """(n, d) one view of the normalised vectors of some items."""
        return self.tables[view][block] * self.factors[view if self.per_view else 0, block, None]

    def is_spoiled(self) -> Tensor:
        return self.factors.isnan().any(0)

    def _factors(self, block: slice) -> Tensor:
        lengths = torch.stack([table[block].float().norm(dim=1) for table in self.tables])
        if not self.per_view:
            lengths = lengths.square().sum(0, keepdim=True).sqrt()
        scale = len(self.tables) ** -0.5 if self.per_view else 1.0
        factors = scale / lengths.clamp(min=EPS) if self.normalised else torch.ones_like(lengths)
        return factors.where(lengths.isfinite(), torch.nan)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, max(self.num_items, 1), ITEMS_AT_ONCE):
            yield slice(start, min(start + ITEMS_AT_ONCE, self.num_items))
