"""Item tables and decoder together: they map histories to states and items to vectors, whose dot products are scores.

Subclasses decide where the rows of the tables are stored: sharded over ranks, or on one device.

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
from mme.model.catalogue import Catalogue, VectorCatalogue
from mme.model.decoder import Decoder, DecoderOutput
from mme.model.feature_rows import FeatureRows
from mme.model.scoring import normalize_views

LOOKUP_ROWS = 16_384  # items per lookup when the catalogue is read


class Encoder(ABC):
    """Maps histories and items to vectors.

    Attributes:
        config: configuration of the model.
        num_items: number of items in the catalogue.
        world: the ranks, which call each method together.
        rows: the rows of items and feature values in the tables.
        decoder: the decoder, without the tables.
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

        A state is NaN if it is not finite or too large to be normalised.
        """
        hidden = self.decode(batch).hidden
        return self._normalize(hidden[batch.seq_offsets[1:] - 1].float())

    @torch.no_grad()
    def catalogue(self) -> Catalogue:
        """This rank's share of the catalogue, with normalised vectors.

        For any sharding of the tables, the shares are equal slices in rank order, of which the last may be shorter or empty. A
        vector is NaN if its rows are not finite or too large to be normalised.
        """
        share = -(-self.num_items // self.world.size)
        first = min(self.world.rank * share, self.num_items)
        last = min(first + share, self.num_items)
        model = self.config.model
        vectors = torch.empty(last - first, model.embedding_dim, device=self.world.device)
        for ids in self._chunks(first, last, share):
            if ids.numel():
                start = int(ids[0]) - first
                vectors[start : start + ids.numel()] = self._normalize(self.lookup(ids))
            else:
                self.lookup(ids)  # a collective
        return VectorCatalogue(first, vectors, model.num_tables)

    def _normalize(self, x: Tensor) -> Tensor:
        """(n, M, d) → (n, D). NaN if the length overflows, which would otherwise give a vector of zeros."""
        length = x.flatten(1).norm(dim=1, keepdim=True)
        return normalize_views(x, self.config.model.score_norm).where(length.isfinite(), torch.nan)

    def _chunks(self, first: int, last: int, share: int) -> Iterator[Tensor]:
        """Yields the same number of chunks on every rank, because a lookup is a collective; the last may be empty."""
        for start in range(0, share, LOOKUP_ROWS):
            begin, end = min(first + start, last), min(first + start + LOOKUP_ROWS, last)
            yield torch.arange(begin, end, device=self.world.device)
