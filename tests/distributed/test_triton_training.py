"""The whole model trains with the Triton kernels as with their PyTorch forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mme.config import load_config
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.state import weight_pieces
from mme.distributed.world import World
from mme.step import TrainStep
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, sequences

STEPS = 3


def train(world: World, backend: str, negatives: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps and the weights after them, with two views and experts, without dropout."""
    config = load_config(
        None,
        [
            "data.path=unused",
            "data.max_seq_len=12",
            "model.num_tables=2",
            "model.embedding_dim=16",
            "model.num_blocks=1",
            "model.moe.num_experts=4",
            "model.dropout=0",
            f"loss.negatives={negatives}",
            "loss.num_negatives=8",
            "loss.negative_group_size=16",
            f"kernels.backend={backend}",
        ],
    )
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=STEPS)
    losses = [step(i, sequences([0, 1, 2, 3, 4])).loss for i in range(STEPS)]
    return losses, {piece.name: piece.read().clone() for piece in weight_pieces(recommender)}


@pytest.mark.parametrize("negatives", ["per_token", "shared"])
def test_triton_trains_like_pytorch(negatives: str) -> None:
    ((losses, weights),) = run_on(1, train, "torch", negatives)
    ((found_losses, found_weights),) = run_on(1, train, "triton", negatives)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        # Adam divides by the root of the second moment. If that is near zero, rounding becomes a step of lr.
        torch.testing.assert_close(found_weights[name], weight, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
