"""The encoder of a trained model: tables and decoder with all their weights on one device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.data.numbering import Numbering
from mme.distributed.world import World
from mme.errors import UserError
from mme.inference.padded import PaddedEncoder
from mme.model.decoder import Decoder
from mme.model.encoder import Encoder
from mme.model.feature_rows import FeatureRows

ALONE_UP_TO = 512  # events; the padded encoder's memory grows with their square


class LocalEncoder(Encoder):
    """Tables and decoder with all their weights on one device."""

    def __init__(
        self, config: Config, numbering: Numbering, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        model = config.model
        self.config, self.num_items = config, len(numbering.item_ids)
        self.world = World.alone(device)
        self.rows = FeatureRows(model, self.num_items, numbering.feature_sizes())
        decoder = Decoder(config)
        expected = {f"decoder/{name}": parameter.shape for name, parameter in decoder.named_parameters()}
        table = torch.Size([self.rows.num_rows, model.view_dim])
        expected |= {f"tables/item_{m}": table for m in range(model.num_tables)}
        for name, shape in expected.items():
            found = tuple(weights[name].shape) if name in weights else None
            if found != tuple(shape):
                raise UserError(f"tensor {name}: expected shape {list(shape)}, found {found and list(found)}")
        decoder.load_state_dict(
            {name: weights[f"decoder/{name}"] for name, _ in decoder.named_parameters()}, strict=False
        )
        self.decoder = decoder.to(device).eval()
        self._tables = torch.stack([weights[f"tables/item_{m}"] for m in range(model.num_tables)], 1).to(device)
        self._alone = self.padded()
        on_cpu = config.train.precision_on(device.type) == "float32" and device.type == "cpu"
        self._encodes_alone = on_cpu and config.kernels.backend != "triton"

    def weights(self) -> dict[str, Tensor]:
        """The weights by the names with which they were passed."""
        tables = {f"tables/item_{m}": self._tables[:, m] for m in range(self._tables.shape[1])}
        return tables | {f"decoder/{name}": value.detach() for name, value in self.decoder.named_parameters()}

    def lookup(self, ids: Tensor) -> Tensor:
        """(U,) int64 rows → (U, M, d)"""
        return self._tables[ids]

    @torch.no_grad()
    def encode(self, batch: SequenceBatch) -> Tensor:
        """See `Encoder.encode`. A single short history, which needs no padding, is encoded without the kernels' plans: they
        take more time than its arithmetic on a CPU."""
        if not self._encodes_alone or batch.seq_offsets.numel() != 2 or batch.num_tokens > ALONE_UP_TO:
            return super().encode(batch)
        events, users = batch.event_features, batch.user_features
        hidden = self._alone.hidden(
            batch.item_ids[None],
            batch.seq_offsets[1:],
            batch.timestamps[None],
            events if events is None else events[None],
            users,
        )
        return self._normalize(hidden)

    def padded(self) -> PaddedEncoder:
        """The same in operators that `torch.export` takes; shares the weights."""
        return PaddedEncoder(self.config, self.decoder, self._tables, self.rows).eval()
