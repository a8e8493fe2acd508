"""How negatives are sampled, and how often each item is expected among them.

A token has n negatives: n_u are sampled uniformly from all I items, the others from a distribution p. The expected count of
item i is q_i = n_u / I + (n − n_u) · p_i. p is

    popularity   p_i ∝ (training events of i)^power, sampled with an alias table
    in_batch     the targets of the global batch, all equally likely; over many batches, p_i ∝ training events of i

The log-Q correction subtracts ln q_i from the logit of a negative. The target is always a candidate: its expected count is 1
and its logit is not changed. The denominator of the softmax is then an unbiased estimate of that over the whole catalogue,
for any p that gives every item a positive probability:

    E[exp z_target + Σ_negatives exp z_i / q_i] = Σ_all exp z_i

Sources: Bengio & Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model"
(2008); Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations" (2019), for in-batch
negatives; Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations" (2020), for
their mixture with uniform ones. The alias table: Walker (1977), filled in one sweep as in Hübschle-Schneider & Sanders,
"Parallel Weighted Random Sampling" (2019).

Legend: I items, n negatives of a token.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.splitmix import derive, mix, random_bits
from mme.config import LossConfig
from mme.data.batch import SequenceBatch


class NegativeSampler:
    """Samples negatives as `loss.sampling` says.

    Args:
        training_counts: (I,) number of training events of each item; None if `LossConfig.needs_training_counts` is false.
    """

    def __init__(self, loss: LossConfig, num_items: int, training_counts: Tensor | None) -> None:
        self.num_items, self.in_batch = num_items, loss.sampling == "in_batch"
        of_all = 1.0 if loss.sampling == "uniform" else loss.uniform_share
        self.num_uniform = round(of_all * loss.num_negatives)
        self.num_others = loss.num_negatives - self.num_uniform
        self.alias_table: tuple[Tensor, Tensor] | None = None
        self.expected_counts: Tensor | None = None
        if not loss.needs_training_counts:
            return
        if training_counts is None:
            raise ValueError(f"loss.sampling={loss.sampling} needs the items' training counts")
        weights = training_counts.cpu().double().numpy() ** (1.0 if self.in_batch else loss.popularity_power)
        weights[training_counts.cpu().numpy() == 0] = 0  # needed for the power 0
        probabilities = weights / weights.sum()
        if not self.in_batch:
            keep, alias = build_alias_table(probabilities)
            self.alias_table = torch.from_numpy(keep).float(), torch.from_numpy(alias)
        self.expected_counts = torch.from_numpy(self.num_uniform / num_items + self.num_others * probabilities)

    def draw(self, keys: Tensor, batch_targets: Tensor) -> Tensor:
        """(groups, n) int64 items, determined by ``keys`` (groups,) int64 and the targets of the global batch."""
        parts = []
        if self.num_uniform:
            parts.append(random_bits(keys, 0, self.num_uniform) % self.num_items)
        if self.num_others:
            bits = random_bits(keys, self.num_uniform, self.num_others)
            parts.append(
                batch_targets[bits % max(1, batch_targets.numel())]
                if self.in_batch
                else self._by_popularity(keys, bits)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def negative_log_counts(self, ids: Tensor) -> Tensor:
        """−ln q of each of ``ids``, float32; 0 for an item that is never sampled."""
        if self.expected_counts is None:  # all negatives are uniform
            return torch.full(ids.shape, -math.log(self.num_uniform / self.num_items), device=ids.device)
        self.expected_counts = self.expected_counts.to(ids.device)
        counts = self.expected_counts[ids]
        return torch.where(counts > 0, -counts.log(), 0).float()

    def _by_popularity(self, keys: Tensor, bits: Tensor) -> Tensor:
        assert self.alias_table is not None
        keep, alias = self.alias_table = self.alias_table[0].to(keys.device), self.alias_table[1].to(keys.device)
        place = bits % self.num_items
        chance = (random_bits(keys, self.num_uniform + self.num_others, self.num_others) >> 39).float() * 2.0**-24
        return torch.where(chance < keep[place], place, alias[place])


def token_keys(batch: SequenceBatch, tokens: Tensor, seed: int) -> Tensor:
    """(groups,) int64 keys from ``seed`` and the user and position of each of ``tokens``, which are rows of the batch.

    Windows of the same user in one step share their negatives.
    """
    return mix(token_places(batch, tokens) + _seed_key(seed, tokens))


def sequence_keys(batch: SequenceBatch, seed: int) -> Tensor:
    """(B,) int64 keys from ``seed`` and the user of each sequence."""
    return derive(_seed_key(seed, batch.user_rows), batch.user_rows)


def _seed_key(seed: int, like: Tensor) -> Tensor:
    """(1,) int64, on the device of ``like``. Filled there: a copy of host memory would wait for the GPU."""
    return mix(like.new_full((1,), seed))


def token_places(batch: SequenceBatch, tokens: Tensor) -> Tensor:
    """(n,) int64 numbers of ``tokens``, ordered by user and then by position in the sequence."""
    sequence = torch.searchsorted(batch.seq_offsets, tokens, right=True) - 1
    return batch.user_rows[sequence] * 2**20 + tokens - batch.seq_offsets[sequence]


def build_alias_table(probabilities: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Two arrays (I,): item i, drawn with probability 1 / I, is kept with probability keep[i] and otherwise becomes alias[i].

    Heavy items top up light ones (probability below 1 / I), both in order. The cumulative deficit before a light item
    determines the heavy item that tops it up. A heavy item that has spent its surplus is topped up by the next heavy item.
    """
    share = probabilities * probabilities.size
    light, heavy = np.flatnonzero(share < 1), np.flatnonzero(share >= 1)
    deficit = np.append(0, np.cumsum(1 - share[light]))  # cumulative, starting at 0
    surplus = np.cumsum(share[heavy] - 1)
    keep, alias = np.where(share < 1, share, 1.0), np.arange(share.size)
    alias[light] = heavy[np.searchsorted(surplus, deficit[:-1]).clip(max=heavy.size - 1)]
    # The last heavy item has no successor and absorbs the rounding error.
    empty_after = np.searchsorted(deficit, surplus[:-1], side="right").clip(max=light.size)
    overdrawn = np.maximum(deficit[empty_after] - surplus[:-1], 0)
    keep[heavy[:-1]] = 1 - overdrawn
    alias[heavy[:-1]] = np.where(overdrawn > 0, heavy[1:], heavy[:-1])
    return keep, alias
