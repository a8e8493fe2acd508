"""Negatives have the right frequencies, and the log-Q correction gives the loss of the whole catalogue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.splitmix import random_bits
from mme.config import Config, LossConfig, load_config
from mme.data.batch import SequenceBatch
from mme.errors import UserError
from mme.model.batch_items import BatchItemSampler
from mme.model.feature_rows import FeatureRows
from mme.model.loss import NextItemLoss
from mme.model.negatives import NegativeSampler, build_alias_table, token_keys
from mme.model.scoring import normalize_views

NUM_ITEMS, VIEWS, DIM = 12, 2, 4
COUNTS = torch.tensor([400, 200, 100, 90, 50, 40, 20, 10, 5, 4, 1, 0])
TARGETS = torch.tensor([0, 0, 0, 1, 5, 5])
DRAWS = 400_000


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2**62, (count,), generator=random(seed))


def assert_frequencies(drawn: Tensor, expected: Tensor) -> None:
    """Checks that each item's share is within five standard deviations of its expectation."""
    found = torch.bincount(drawn.flatten(), minlength=NUM_ITEMS).double() / drawn.numel()
    deviation = (expected * (1 - expected) / drawn.numel()).sqrt()
    assert ((found - expected).abs() <= 5 * deviation).all(), (found, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 50, 5000])
@pytest.mark.parametrize("power", [0.0, 0.75, 3.0])
def test_alias_table_represents_the_probabilities(size: int, power: float) -> None:
    generator = np.random.default_rng(size)
    weights = generator.pareto(0.7, size) ** power * (generator.random(size) < 0.7)
    weights[-1] = 1
    probabilities = weights / weights.sum()
    keep, alias = build_alias_table(probabilities)
    assert keep.min() >= 0 and keep.max() <= 1
    found = keep.copy()
    np.add.at(found, alias, 1 - keep)
    np.testing.assert_allclose(found / size, probabilities, rtol=1e-9, atol=1e-15)
    assert (found[weights == 0] == 0).all()


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_popularity(power: float) -> None:
    loss = LossConfig(sampling="popularity", popularity_power=power, num_negatives=100)
    drawn = NegativeSampler(loss, NUM_ITEMS, COUNTS).draw(keys(DRAWS // 100), TARGETS)
    weights = torch.where(COUNTS > 0, COUNTS.double() ** power, 0)
    assert_frequencies(drawn, weights / weights.sum())


def test_in_batch_negatives_with_a_share_of_uniform_ones() -> None:
    frequency = torch.bincount(TARGETS, minlength=NUM_ITEMS).double() / TARGETS.numel()
    drawn = NegativeSampler(LossConfig(sampling="in_batch"), NUM_ITEMS, None).draw(keys(DRAWS // 128), TARGETS)
    assert_frequencies(drawn, frequency)
    loss = LossConfig(sampling="in_batch", uniform_share=0.25, num_negatives=100)
    drawn = NegativeSampler(loss, NUM_ITEMS, None).draw(keys(DRAWS // 100), TARGETS)
    assert drawn.shape == (DRAWS // 100, 100)
    assert_frequencies(drawn[:, :25], torch.full((NUM_ITEMS,), 1 / NUM_ITEMS, dtype=torch.float64))
    assert_frequencies(drawn[:, 25:], frequency)


@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in_batch"])
def test_a_seed_repeats_the_draws(sampling: str) -> None:
    loss = LossConfig(sampling=sampling, uniform_share=0.5)  # type: ignore[arg-type]
    sampler = NegativeSampler(loss, NUM_ITEMS, COUNTS)
    first, again, other = (sampler.draw(keys(3, seed), TARGETS) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sampler.draw(keys(0), TARGETS[:0]).shape == (0, 128)


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first of the sequences that start at 0 and at 1234567, as the reference implementation in C prints them."""
    wanted = [[0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], [6457827717110365317, 3203168211198807973]]
    for key, numbers in zip((0, 1234567), wanted, strict=True):
        found = random_bits(torch.tensor([key]), 0, len(numbers))[0].tolist()
        assert found == [number % 2**63 for number in numbers]
    assert torch.equal(random_bits(torch.tensor([7]), 2, 3), random_bits(torch.tensor([7]), 0, 5)[:, 2:])


def test_a_tokens_negatives_do_not_depend_on_its_batch() -> None:
    lengths, users = [3, 5, 0, 2], [8, 2, 5, 1_000_000_000]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    items = torch.arange(10)
    batch = SequenceBatch(items, offsets, torch.arange(14), items, torch.tensor(users))
    own = token_keys(batch, torch.arange(10), 3)
    assert own.unique().numel() == 10
    for part, place in zip(batch.split(2), own.split([8, 2]), strict=True):
        assert torch.equal(token_keys(part, torch.arange(part.num_tokens), 3), place)
    assert not (own == token_keys(batch, torch.arange(10), 4)).any()


def config_of(*options: str) -> Config:
    model = [f"model.num_tables={VIEWS}", f"model.embedding_dim={VIEWS * DIM}"]
    return load_config(None, ["data.path=unused", "loss.temperature=0.5", *model, *options])


def sampler_of(config: Config) -> BatchItemSampler:
    return BatchItemSampler(config.loss, FeatureRows(config.model, NUM_ITEMS, {}), COUNTS)


def batch() -> SequenceBatch:
    num_tokens = TARGETS.numel()
    return SequenceBatch(
        item_ids=torch.arange(num_tokens),
        seq_offsets=torch.tensor([0, num_tokens]),
        timestamps=torch.arange(num_tokens + 1),
        target_ids=TARGETS,
        user_rows=torch.zeros(1, dtype=torch.int64),
    )


def leaves() -> list[Tensor]:
    """hidden (T, M, d) and the whole tables (I, M, d)."""
    generator = random(5)
    shapes = [(TARGETS.numel(), VIEWS, DIM), (NUM_ITEMS, VIEWS, DIM)]
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def gradients_of(config: Config, seed: int) -> list[Tensor]:
    """The loss of each token and its gradients."""
    hidden, tables = leaves()
    (items,) = sampler_of(config)([batch()], seed)
    found = NextItemLoss(config, NUM_ITEMS)(hidden, tables[items.ids], items)
    return [found.detach(), *torch.autograd.grad(found.sum(), [hidden, tables])]


def logits(hidden: Tensor, tables: Tensor) -> Tensor:
    """(T, I) logits of the whole catalogue."""
    return normalize_views(hidden, "concat") @ normalize_views(tables, "concat").T / 0.5


@pytest.mark.parametrize("negatives", ["per_token", "shared"])
@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in_batch"])
def test_corrected_loss_and_gradients_against_the_definition(sampling: str, negatives: str) -> None:
    config = config_of(
        f"loss.sampling={sampling}",
        "loss.uniform_share=0.3",
        "loss.log_q_correction=true",
        f"loss.negatives={negatives}",
        "loss.negative_group_size=4",
        "loss.num_negatives=50",
    )
    hidden, tables = (leaf.detach().double().requires_grad_() for leaf in leaves())
    (items,) = sampler_of(config)([batch()], 1)
    assert items.negatives is not None
    own = items.ids[items.negatives][torch.arange(TARGETS.numel()) // (4 if negatives == "shared" else 1)]
    weights = COUNTS.double() ** (1 if sampling == "in_batch" else 0.75)
    uniform = 50 if sampling == "uniform" else 15
    expected_counts = uniform / NUM_ITEMS + (50 - uniform) * weights / weights.sum()
    whole = logits(hidden, tables)
    negative = whole.gather(1, own) - expected_counts.log()[own]
    negative = negative.masked_fill(own == TARGETS[:, None], -math.inf)
    positive = whole.gather(1, TARGETS[:, None])
    wanted = torch.logsumexp(torch.cat([positive, negative], 1), 1) - positive[:, 0]
    found, *gradients = gradients_of(config, 1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, torch.autograd.grad(wanted.sum(), [hidden, tables]), strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def error_against_full_softmax(sampling: str, *options: str) -> float:
    """The error of the mean gradient over many draws, relative to that of the softmax over the whole catalogue."""
    exact = torch.cat([gradient.flatten() for gradient in gradients_of(config_of("loss.kind=full_softmax"), 0)[1:]])
    config = config_of(f"loss.sampling={sampling}", "loss.num_negatives=500", *options)
    draws = [torch.cat([g.flatten() for g in gradients_of(config, seed)[1:]]) for seed in range(20)]
    return float((torch.stack(draws).mean(0) - exact).norm() / exact.norm())


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_correction_gives_the_gradient_of_the_full_softmax(sampling: str) -> None:
    """Every item can be sampled; without the correction, popular items are penalised for their popularity."""
    corrected = error_against_full_softmax(sampling, "loss.uniform_share=0.2", "loss.log_q_correction=true")
    without = error_against_full_softmax(sampling, "loss.uniform_share=0.2")
    assert corrected < 0.02
    assert without > 5 * corrected


def test_training_counts_correct_in_batch_negatives_on_average() -> None:
    """Over batches whose targets follow the training events, in-batch negatives sum to the whole catalogue."""
    config = config_of("loss.sampling=in_batch", "loss.log_q_correction=true", "loss.uniform_share=0.2")
    sampler = NegativeSampler(config.loss, NUM_ITEMS, COUNTS)
    whole = torch.linspace(-1, 1, NUM_ITEMS).double()
    batches = torch.multinomial(COUNTS.double(), 64 * 2000, replacement=True, generator=random(1)).view(2000, 64)
    sums = []
    for targets in batches:
        drawn = sampler.draw(keys(1, int(targets.sum())), targets)[0]
        sums.append((whole[drawn] + sampler.negative_log_counts(drawn)).exp().sum())
    assert torch.stack(sums).mean().item() == pytest.approx(whole.exp().sum().item(), rel=0.03)


def test_contradicting_settings_are_rejected() -> None:
    with pytest.raises(UserError, match=r"loss.kind=full_softmax has no negatives"):
        config_of("loss.kind=full_softmax", "loss.log_q_correction=true")
    with pytest.raises(UserError, match=r"loss.uniform_share \(1.5\) must be at least 0 and at most 1"):
        config_of("loss.uniform_share=1.5")
