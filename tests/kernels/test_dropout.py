"""Dropout by a key per row has the right share of zeros, independent elements, and the defined bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels import gated_rms_norm
from kernels.dropout import FACTOR, dropout, dropout_mask
from kernels.splitmix import GOLDEN_GAMMA, derive, random_bits

ROWS, WIDTH = 4000, 1000


def row_keys(rows: int, seed: int = 0) -> Tensor:
    return derive(torch.arange(rows), seed)


def splitmix(state: int) -> int:
    """SplitMix64's finaliser, from the paper, in Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_keys_are_those_of_splitmix() -> None:
    gamma = GOLDEN_GAMMA % 2**64
    assert splitmix(gamma) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from state 0
    found = random_bits(torch.tensor([0, 7]), 3, 5)
    expected = [[splitmix((key + (i + 4) * gamma) % 2**64) % 2**63 for i in range(5)] for key in (0, 7)]
    assert found.tolist() == expected


@pytest.mark.parametrize("width", [1, 4, 50])
def test_bits_are_those_of_the_definition(width: int) -> None:
    """Computes the bits with Python's integers, with which every device must agree."""
    keys, dropped, gamma = row_keys(3), 20_000, GOLDEN_GAMMA % 2**64
    mask, scale = dropout_mask(keys, width, dropped)
    assert scale == 65_536 / 45_536
    for row, key in enumerate(keys.tolist()):
        for column in range(width):
            word = key * (splitmix((column // 4 + 1) * gamma % 2**64) | 1) % 2**64
            signed = word - 2**64 if word >= 2**63 else word
            word = (signed ^ (signed >> 32)) * FACTOR % 2**64
            bits = word >> 16 * (column % 4) & 0xFFFF
            bits = bits - 2**16 if bits >= 2**15 else bits
            assert mask[row, column].item() == (bits >= dropped - 2**15)


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.999999])
def test_share_of_zeros(probability: float) -> None:
    dropped = min(round(probability * 65_536), 65_535)
    mask, _ = dropout_mask(row_keys(ROWS), WIDTH, dropped)
    expected = dropped / 65_536
    deviation = (expected * (1 - expected) / mask.numel()) ** 0.5
    assert 1 - mask.double().mean().item() == pytest.approx(expected, abs=5 * deviation)


def test_neither_rows_nor_columns_share_their_bits() -> None:
    """The means and all pairwise correlations, of columns over rows and of rows over columns, are those of noise."""
    centred = 2 * dropout_mask(row_keys(ROWS), WIDTH, 32_768)[0].double() - 1
    assert centred.mean(0).abs().max() < 5 / ROWS**0.5
    assert centred.mean(1).abs().max() < 5 / WIDTH**0.5
    columns = centred.T @ centred / ROWS**0.5
    off_diagonal = columns[~torch.eye(WIDTH, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 6  # of half a million standard normal numbers; 5.1 is expected
    assert off_diagonal.square().mean().item() == pytest.approx(1, abs=0.01)
    rows = (centred[:1000] @ centred[:1000].T / WIDTH**0.5)[~torch.eye(1000, dtype=torch.bool)]
    assert rows.abs().max() < 6
    assert rows.square().mean().item() == pytest.approx(1, abs=0.01)
    # Three neighbouring columns, which may or may not share a word.
    triples = (centred[:, :-2] * centred[:, 1:-1] * centred[:, 2:]).mean(0) * ROWS**0.5
    assert triples.abs().max() < 5


def test_keys_of_places_and_views_are_independent() -> None:
    token = row_keys(ROWS)
    views = derive(token, torch.arange(4)[:, None])
    masks = [
        2 * dropout_mask(keys, 64, 32_768)[0].double() - 1 for keys in [*views, *(derive(views[0], i) for i in (0, 1))]
    ]
    for first in range(len(masks)):
        for second in range(first):
            assert abs((masks[first] * masks[second]).mean().item()) < 5 / (ROWS * 64) ** 0.5


def test_scales_what_stays_and_its_gradient() -> None:
    x = torch.randn(4, 100, 500, requires_grad=True)
    y = dropout(x, 0.25, row_keys(400).view(4, 100))
    stays = y != 0
    assert stays.double().mean().item() == pytest.approx(0.75, abs=5e-3)
    torch.testing.assert_close(y, torch.where(stays, x / 0.75, 0.0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, stays / 0.75)
    assert torch.equal(dropout(x, 0.0, None), x)


def test_norms_drop_the_same_in_backward() -> None:
    def dropped(u: Tensor, a: Tensor) -> Tensor:
        return gated_rms_norm(u, a, dropout_p=0.4, dropout_keys=row_keys(5))

    assert gradcheck(dropped, [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)])


def test_keys_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="dropout_keys are required"):
        dropout(torch.ones(2, 3), 0.1, None)
    with pytest.raises(
        ValueError, match=r"dropout_keys have shape \(3,\) and dtype torch\.int64 on cpu, expected \(2,\)"
    ):
        dropout(torch.ones(2, 3), 0.1, torch.arange(3))
