"""`model.block` and `loss.kind` accept exactly the implemented names."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from mme.config import LossConfig, ModelConfig, load_config
from mme.model.blocks import BLOCKS, make_block
from mme.model.fuxi_block import FuxiBlock
from mme.model.loss import LOSSES
from mme.model.moe import DenseFFN, MixtureOfExperts


def test_every_name_has_an_implementation() -> None:
    assert set(BLOCKS) == set(get_args(get_type_hints(ModelConfig)["block"]))
    assert set(LOSSES) == set(get_args(get_type_hints(LossConfig)["kind"]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_keeps_the_shape_and_sees_no_later_token(kind: str) -> None:
    """Changes the last token of a sequence of 3 tokens, and all tokens of one of 4."""
    options = ["model.num_tables=2", "model.embedding_dim=16", "model.moe.num_experts=0", "data.max_seq_len=5"]
    block = make_block(load_config(None, ["data.path=unused", f"model.block={kind}", *options]), 0).eval()
    x, seq_offsets, timestamps = torch.randn(2, 7, 8), torch.tensor([0, 3, 7]), torch.arange(9) * 100
    changed = x.clone()
    changed[:, 2:] += 1
    found, other = block(x, seq_offsets, timestamps)[0], block(changed, seq_offsets, timestamps)[0]
    assert found.shape == x.shape
    torch.testing.assert_close(found[:, :2], other[:, :2])
    assert not torch.isclose(found[:, 2:], other[:, 2:]).all()


@pytest.mark.parametrize(("placement", "expected"), [("[]", [0, 1, 2]), ("[2,0,2]", [0, 2])])
def test_experts_are_where_they_are_placed(placement: str, expected: list[int]) -> None:
    config = load_config(None, ["data.path=unused", "model.num_blocks=3", f"model.moe.placement={placement}"])
    assert config.model.expert_blocks == expected
    for index in range(3):
        block = make_block(config, index)
        assert isinstance(block, FuxiBlock)
        assert isinstance(block.ffn, MixtureOfExperts if index in expected else DenseFFN)
