"""The decoder with one view computes FuXi-α, and sequences and views do not see each other."""

from __future__ import annotations

import pytest
import torch

from mme.config import load_config
from mme.model.decoder import Decoder
from mme.model.inputs import positions_in_sequence

NUM_ITEMS = 12


def decoder(*overrides: str) -> Decoder:
    torch.manual_seed(0)
    fixed = ["data.path=unused", "data.max_seq_len=9", "model.embedding_dim=16", "model.num_heads=2"]
    return Decoder(load_config(None, [*fixed, *overrides])).eval()


def inputs(lengths: list[int], num_tables: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    total = sum(lengths)
    rows = torch.randn(NUM_ITEMS, num_tables, 16 // num_tables, generator=generator)
    index = torch.randint(NUM_ITEMS, (total,), generator=generator)
    times = torch.cat([torch.randint(10_000, (length + 1,), generator=generator).cumsum(0) for length in lengths])
    return rows, index, torch.tensor([0, *lengths]).cumsum(0), times


@pytest.mark.parametrize("num_experts", [0, 4])
def test_sequences_do_not_see_each_other_nor_the_future(num_experts: int) -> None:
    model = decoder("model.num_tables=2", f"model.moe.num_experts={num_experts}")
    rows, index, offsets, times = inputs([4, 0, 9, 1], 2)
    together = model(rows, index, offsets, times).hidden
    assert together.shape == (14, 2, 8)
    alone = model(rows, index[4:13], torch.tensor([0, 9]), times[6:16]).hidden
    torch.testing.assert_close(together[4:13], alone)
    prefix = model(rows, index[4:10], torch.tensor([0, 6]), times[6:13]).hidden
    torch.testing.assert_close(alone[:6], prefix)


def test_views_share_the_decoder_and_do_not_see_each_other() -> None:
    model = decoder("model.num_tables=2", "model.moe.num_experts=4", "model.positions=shared")
    rows, index, offsets, times = inputs([4, 3], 2)
    hidden = model(rows, index, offsets, times).hidden
    swapped = model(rows.flip(1), index, offsets, times).hidden
    torch.testing.assert_close(swapped, hidden.flip(1))
    changed = rows.clone()
    changed[:, 1] += 1
    torch.testing.assert_close(model(changed, index, offsets, times).hidden[:, 0], hidden[:, 0])


def test_placement_selects_the_blocks_with_experts() -> None:
    model = decoder("model.num_tables=2", "model.num_blocks=3", "model.moe.num_experts=4", "model.moe.placement=[1]")
    assert [hasattr(block.ffn, "router") for block in model.blocks] == [False, True, False]
    rows, index, offsets, times = inputs([4], 2)
    assert len(model(rows, index, offsets, times).routing) == 1


def test_positions_start_at_zero_in_each_sequence() -> None:
    assert positions_in_sequence(torch.tensor([0, 2, 2, 5]), 5).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("precision, dtype", [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_computes_in_the_configured_precision_with_float32_weights(precision: str, dtype: torch.dtype) -> None:
    model = decoder("model.num_tables=2", "model.moe.num_experts=4", f"train.precision={precision}")
    assert model(*inputs([4, 3], 2)).hidden.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
