"""Prints the kernels that a training step launches and those that `mme.model.kernel_variants` compiles before it.

python -m tests.model.step_launches model.num_tables=1 model.moe.num_experts=0
"""

from __future__ import annotations

import json
import sys

import torch

from mme.config import load_config
from mme.data.batch import SequenceBatch
from mme.model.batch_items import BatchItemSampler
from mme.model.decoder import Decoder
from mme.model.feature_rows import FeatureRows
from mme.model.kernel_variants import training_variants
from mme.model.loss import NextItemLoss
from tests.kernels.launches import ARCH, described, recorded

NUM_ITEMS = 400


def main(overrides: list[str]) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as on GPUs
    config = load_config(None, ["data.path=unused", "data.max_seq_len=60", "train.precision=bfloat16", *overrides])
    sampler = BatchItemSampler(config.loss, FeatureRows(config.model, NUM_ITEMS, {}))
    decoder, loss = Decoder(config).train(), NextItemLoss(config, NUM_ITEMS)
    with recorded() as launched:
        for lengths in ([60, 20], [1, 60, 30, 6]):
            batch = random_batch(lengths)
            (items,) = sampler([batch], seed=0)
            rows = torch.randn(items.ids.numel(), config.model.num_tables, config.model.view_dim, requires_grad=True)
            keys = torch.arange(batch.num_sequences)
            output = decoder(rows, items.inputs.items, batch.seq_offsets, batch.timestamps, dropout_keys=keys)
            loss(output.hidden, rows, items).sum().backward()
    print(
        json.dumps(
            {"launched": sorted(launched), "compiled": sorted(map(described, training_variants(config, ARCH, 1)))}
        )
    )


def random_batch(lengths: list[int]) -> SequenceBatch:
    tokens = sum(lengths)
    ids = torch.randint(NUM_ITEMS, (2, tokens))
    return SequenceBatch(
        item_ids=ids[0],
        seq_offsets=torch.tensor([0, *lengths]).cumsum(0),
        timestamps=torch.arange(tokens + len(lengths)),
        target_ids=ids[1],
        user_rows=torch.arange(len(lengths)),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
