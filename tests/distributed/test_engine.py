"""The decoder's optimizer under DeepSpeed."""

from __future__ import annotations

import torch

from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration


def decayed(world: World, weight_decay_on: str) -> list[str]:
    """The weights of the decoder that shrink in a step without gradients."""
    config = configuration("train.weight_decay=1", "train.lr=0.1", f"train.weight_decay_on={weight_decay_on}")
    recommender = Recommender(config, NUM_ITEMS, world)
    engine = initialize_engine(recommender.decoder, config)
    with torch.no_grad():
        for parameter in recommender.decoder.parameters():
            parameter.fill_(1.0)
    for group in engine.optimizer.single_partition_of_fp32_groups:
        group.data.fill_(1.0)
    engine.backward(sum(parameter.sum() for parameter in recommender.decoder.parameters()) * 0)
    engine.step()
    weights = dict(recommender.decoder.named_parameters())
    assert all(bool(((w == 1) | ((w - 0.9).abs() < 1e-6)).all()) for w in weights.values())
    return sorted(name for name, weight in weights.items() if bool((weight < 1).all()))


def test_weight_decay_of_all_weights_or_of_matrices() -> None:
    for everything, matrices in zip(run_on(2, decayed, "all"), run_on(2, decayed, "matrices"), strict=True):
        spared = set(everything) - set(matrices)
        assert {"inputs.positions", "blocks.0.output.bias", "blocks.0.ts_weights", "blocks.0.pos_weights"} <= spared
        assert {"blocks.0.uvqk", "blocks.0.output.weight", "blocks.0.ffn.router.weight"} <= set(matrices)
        assert {name.rpartition(".")[2] for name in matrices} == {"uvqk", "weight", "w1", "w2", "w3"}
