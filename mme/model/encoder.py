"""Item tables and decoder together: histories to states, items to vectors. Scores are their dot products.

Where the rows of the tables are stored is decided by the subclass: sharded over ranks, or on one device.

Legend: B sequences, M views, d view width, D = M·d, U distinct rows of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.data.loaders import Worker
from mme.model.batch_items import distinct_ids
from mme.model.decoder import Decoder, DecoderOutput
from mme.model.feature_rows import FeatureRows
from mme.model.scoring import normalize_views

LOOKUP_ROWS = 65_536  # items of one lookup when the catalogue is read


class Encoder(ABC):
    """
    Attributes:
        config: of the model.
        num_items: of the catalogue.
        world: the ranks that call each method together.
        rows: where items and feature values stand in the tables.
        decoder: without the tables.
    """

    config: Config
    num_items: int
    world: Worker
    rows: FeatureRows
    decoder: Decoder

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """(U,) int64 rows of the tables → (U, M, d) float32."""

    @torch.no_grad()
    def decode(self, batch: SequenceBatch) -> DecoderOutput:
        """The decoder's output for given histories, without dropout."""
        self.decoder.eval()
        ids, (items, events, users) = distinct_ids(self.rows.inputs_of(batch), self.rows.num_rows)
        return self.decoder(self.lookup(ids), items, batch.seq_offsets, batch.timestamps, events, users)

    @torch.no_grad()
    def encode(self, batch: SequenceBatch) -> Tensor:
        """(B, D) the normalised state of each history after its last token; every history has at least one.

        NaN where a state is not finite or too large to be normalised.
        """
        hidden = self.decode(batch).hidden
        return self._normalize(hidden[batch.seq_offsets[1:] - 1].float())

    @torch.no_grad()
    def catalogue(self) -> tuple[int, Tensor]:
        """This rank's share of the catalogue: its first item, and the normalised vectors (share, D) of it and the next.

        The shares are equal slices in rank order whatever the tables' sharding; no rank holds all of them. A vector
        is NaN where its rows are not finite or too large to be normalised.
        """
        share = -(-self.num_items // self.world.size)
        first = min(self.world.rank * share, self.num_items)
        last = min(first + share, self.num_items)
        vectors = [self._normalize(self.lookup(ids)) for ids in self._chunks(first, last, share)]
        return first, torch.cat(vectors)

    def _normalize(self, x: Tensor) -> Tensor:
        """(n, M, d) → (n, D). A length that overflows would turn the vector into zeros, so NaN takes its place."""
        length = x.flatten(1).norm(dim=1, keepdim=True)
        return normalize_views(x, self.config.model.score_norm).where(length.isfinite(), torch.nan)

    def _chunks(self, first: int, last: int, share: int) -> Iterator[Tensor]:
        """As many chunks on every rank, since each lookup is a collective; the last ones may be empty."""
        for start in range(0, share, LOOKUP_ROWS):
            begin, end = min(first + start, last), min(first + start + LOOKUP_ROWS, last)
            yield torch.arange(begin, end, device=self.world.device)
