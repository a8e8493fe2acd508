"""What the rest of the program asks the configuration instead of deriving it again."""

from __future__ import annotations

import pytest

from mme.config import LossConfig, ModelConfig, MoEConfig


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ModelConfig(num_tables=1, moe=MoEConfig(num_experts=0)), "fuxi-alpha"),
        (ModelConfig(num_tables=1, moe=MoEConfig(num_experts=8)), "fuxi-mme"),
        (ModelConfig(num_tables=4, moe=MoEConfig(num_experts=0)), "fuxi-mme"),
        (ModelConfig(), "fuxi-mme"),
        (ModelConfig(block="sasrec", num_tables=1), "sasrec"),
        (ModelConfig(block="hstu", num_tables=2), "hstu"),
    ],
)
def test_name_of_the_model(model: ModelConfig, name: str) -> None:
    assert model.name == name


@pytest.mark.parametrize(
    ("views", "softmax_views", "softmaxes"), [("together", [4], 1), ("each", [1], 4), ("both", [4, 1], 5)]
)
def test_softmaxes_of_a_token(views: str, softmax_views: list[int], softmaxes: int) -> None:
    loss = LossConfig(views=views)
    assert loss.softmax_views(4) == softmax_views
    assert loss.num_passes == len(softmax_views)
    assert loss.num_softmaxes(4) == softmaxes


@pytest.mark.parametrize(
    ("loss", "groups", "scored"),
    [
        (LossConfig(num_negatives=9), [0, 1, 7], 10),
        (LossConfig(num_negatives=9, negatives="shared", negative_group_size=3), [0, 1, 3], 10),
        (LossConfig(num_negatives=9, negatives="shared", negative_group_size=0), [0, 1, 1], 10),
        (LossConfig(kind="full_softmax"), [0, 1, 7], 50),
    ],
)
def test_negatives_of_a_batch(loss: LossConfig, groups: list[int], scored: int) -> None:
    assert [loss.num_groups(tokens) for tokens in (0, 1, 7)] == groups
    assert loss.num_scored(50) == scored
