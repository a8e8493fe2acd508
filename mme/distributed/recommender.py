"""The whole model over all ranks: sharded item tables under TorchRec, the decoder with its experts.

Legend: B sequences, T tokens, M views, d view width, D = M·d, U distinct items of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.distributed.experts import spread_experts
from mme.distributed.tables import ItemTables
from mme.distributed.world import World
from mme.errors import UserError
from mme.model.batch_items import distinct_ids
from mme.model.decoder import Decoder, DecoderOutput
from mme.model.feature_rows import FeatureRows
from mme.model.scoring import normalize_views

LOOKUP_ROWS = 65_536  # items that one lookup brings when the catalogue is read


class Recommender:
    """Item tables and decoder; every rank holds its shard and calls each method together with the others.

    Args:
        feature_sizes: see `mme.model.feature_rows.FeatureRows`; None: the configuration names no features.

    Raises:
        UserError: `kernels.backend` cannot run on this device.
    """

    def __init__(
        self, config: Config, num_items: int, world: World, feature_sizes: Mapping[str, int] | None = None
    ) -> None:
        try:
            resolve_backend(config.kernels.backend, world.device)
        except ValueError as error:
            raise UserError(f"kernels.backend: {error}") from error
        self.config = config
        self.num_items = num_items
        self.world = world
        self.rows = FeatureRows(config.model, num_items, feature_sizes or {})
        self.tables = ItemTables(config, self.rows.num_rows, world)
        torch.manual_seed(config.train.seed)  # the same decoder on every rank
        self.decoder = Decoder(config)
        if config.model.moe.num_experts:
            spread_experts(self.decoder, config.experts_over(world.size))
        self.decoder.to(world.device)

    def num_parameters(self) -> dict[str, int]:
        """Parameters of the whole model by part, over all ranks."""
        tables = self.config.model.num_tables * self.rows.num_rows * self.config.model.view_dim
        layers = self.decoder.moe_layers()
        here = sum(p.numel() for layer in layers for p in layer.experts.parameters())
        everywhere = sum(layer.num_experts * p[0].numel() for layer in layers for p in layer.experts.parameters())
        decoder = sum(p.numel() for p in self.decoder.parameters()) - here
        return {"item tables": tables, "decoder": decoder, "experts": everywhere}

    @torch.no_grad()
    def decode(self, batch: SequenceBatch) -> DecoderOutput:
        """The decoder's output for given histories, without dropout."""
        self.decoder.eval()
        ids, (items, events, users) = distinct_ids(self.rows.inputs_of(batch), self.rows.num_rows)
        return self.decoder(self.tables.lookup(ids), items, batch.seq_offsets, batch.timestamps, events, users)

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

        The shares are equal slices in rank order whatever the tables' sharding; no rank ever holds the whole. A vector
        is NaN where its rows are not finite or too large to be normalised.
        """
        share = -(-self.num_items // self.world.size)
        first = min(self.world.rank * share, self.num_items)
        last = min(first + share, self.num_items)
        vectors = [self._normalize(self.tables.lookup(ids)) for ids in self._chunks(first, last, share)]
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
