"""The padded encoder computes what the decoder computes: every block, experts, routers, features."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from mme.config import Config, load_config
from mme.data.features import Vocabulary
from mme.data.numbering import Numbering
from mme.inference.model import Knowledge, TrainedModel
from mme.inference.program import largest_difference
from mme.model.decoder import Decoder

ITEMS = 40
BLOCKS = [
    ["model.moe.num_experts=0"],
    ["model.moe.num_experts=5", "model.moe.top_k=2", "model.moe.router=all_views"],
    ["model.moe.num_experts=3", "model.moe.top_k=1", "model.moe.renormalize=false", "model.positions=shared"],
    ["model.block=hstu", "model.moe.num_experts=0", "model.score_norm=per_view"],
    ["model.block=sasrec", "model.moe.num_experts=0", "model.num_tables=1"],
    ["model.block=sasrec", "model.moe.num_experts=0", "model.sasrec.norm_first=false", "model.score_norm=none"],
    ["model.block=ligr", "model.moe.num_experts=0", "model.final_norm=true", "model.positions_from=newest"],
    ["model.moe.num_experts=4", "model.event_features=[action]", "model.user_features=[country]"],
]


def untrained(config: Config) -> TrainedModel:
    """A model with random weights, large enough that every part of it matters."""
    vocabularies = {
        name: Vocabulary(values) for name, values in (("action", ["buy", "view"]), ("country", ["at", "ch", "de"]))
        if name in config.model.feature_columns
    }  # fmt: skip
    numbering = Numbering(pa.array(range(1000, 1000 + ITEMS)), vocabularies, None)
    generator = torch.Generator().manual_seed(1)
    rows = ITEMS + sum(numbering.feature_sizes()[name] for name in config.model.feature_columns)
    weights = {
        f"decoder/{name}": 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in Decoder(config).named_parameters()
    }
    for table in range(config.model.num_tables):
        weights[f"tables/item_{table}"] = 0.3 * torch.randn(rows, config.model.view_dim, generator=generator)
    knowledge = Knowledge(numbering, np.ones(ITEMS, np.int64), (1_600_000_000, 1_700_000_000))
    return TrainedModel(config, knowledge, weights, "untrained", "cpu")


@pytest.mark.parametrize("overrides", BLOCKS, ids=lambda overrides: overrides[0])
def test_it_computes_what_the_decoder_computes(overrides: list[str]) -> None:
    small = [
        "data.path=nowhere",
        "data.max_seq_len=24",
        "model.embedding_dim=16",
        "model.num_tables=2",
        "model.num_heads=2",
    ]
    model = untrained(load_config(None, [*small, "kernels.backend=torch", *overrides]))
    assert largest_difference(model, model.padded_encoder()) < 2e-6
