"""The whole model over all ranks: item tables sharded by TorchRec, and the decoder with its experts.

Legend: B sequences, T tokens, M views, d view width, D = M·d, U distinct items of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.backend import resolve_backend
from mme.config import Config
from mme.distributed.experts import spread_experts
from mme.distributed.tables import ItemTables
from mme.distributed.world import World
from mme.errors import UserError
from mme.model.catalogue import Catalogue, TableCatalogue
from mme.model.decoder import Decoder
from mme.model.encoder import Encoder
from mme.model.feature_rows import FeatureRows


class Recommender(Encoder):
    """Item tables and decoder. Every rank holds its shard; `lookup` is a collective.

    Args:
        feature_sizes: see `mme.model.feature_rows.FeatureRows`; None: the configuration names no features.
        substitutes: likewise.
        initialise_tables: False leaves the tables' weights uninitialised, for a checkpoint to fill.

    Raises:
        UserError: `kernels.backend` cannot run on this device.
    """

    world: World

    def __init__(
        self,
        config: Config,
        num_items: int,
        world: World,
        feature_sizes: Mapping[str, int] | None = None,
        initialise_tables: bool = True,
        substitutes: Mapping[str, Tensor] | None = None,
    ) -> None:
        try:
            resolve_backend(config.kernels.backend, world.device)
        except ValueError as error:
            raise UserError(f"kernels.backend: {error}") from error
        self.config = config
        self.num_items = num_items
        self.world = world
        self.rows = FeatureRows(config.model, num_items, feature_sizes or {}, substitutes)
        self.tables = ItemTables(config, self.rows.num_rows, world, initialise_tables)
        torch.manual_seed(config.train.seed)  # the same decoder on every rank
        self.decoder = Decoder(config)
        if config.model.moe.num_experts:
            spread_experts(self.decoder, config.experts_over(world.size))
        self.decoder.to(world.device)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.tables.lookup(ids)

    @torch.no_grad()
    def catalogue(self) -> Catalogue:
        """This rank's share of the items, in place if its tables have their whole rows: no vector is copied."""
        if (here := self.tables.whole_rows()) is None:
            return super().catalogue()
        first, tables = here
        last = min(first + tables[0].shape[0], self.num_items)
        if self.tables.replicated:  # an equal share of the replicas' rows
            share = -(-self.num_items // self.world.size)
            first = min(self.world.rank * share, self.num_items)
            last = min(first + share, self.num_items)
            tables = [table[first:] for table in tables]
        rows = [table[: max(last - first, 0)] for table in tables]
        return TableCatalogue(first, rows, self.config.model.score_norm)

    def num_parameters(self) -> dict[str, int]:
        """Parameters of the whole model by part, over all ranks."""
        tables = self.config.model.num_tables * self.rows.num_rows * self.config.model.view_dim
        layers = self.decoder.moe_layers()
        here = sum(p.numel() for layer in layers for p in layer.experts.parameters())
        everywhere = sum(layer.num_experts * p[0].numel() for layer in layers for p in layer.experts.parameters())
        decoder = sum(p.numel() for p in self.decoder.parameters()) - here
        return {"item tables": tables, "decoder": decoder, "experts": everywhere}
