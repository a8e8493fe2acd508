"""SplitMix64: random bits that depend only on a key and a number, so they can be computed in any order and on any device.

Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators" (2014). All numbers are int64; products wrap around.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed(unsigned: int) -> int:
    """The int64 with the same 64 bits."""
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


GOLDEN_GAMMA = signed(0x9E3779B97F4A7C15)
FACTORS = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def mix(state: Tensor) -> Tensor:
    """Applies SplitMix64's finaliser to each element, in place."""
    state ^= (state >> 30).bitwise_and_(2**34 - 1)  # the mask makes the shift of a signed number a logical one
    state *= FACTORS[0]
    state ^= (state >> 27).bitwise_and_(2**37 - 1)
    state *= FACTORS[1]
    state ^= (state >> 31).bitwise_and_(2**33 - 1)
    return state


def derive(keys: Tensor, number: int | Tensor) -> Tensor:
    """Derives new keys from ``keys`` and ``number`` ≥ 0, which may be a tensor that broadcasts against them."""
    if isinstance(number, int):
        return mix(keys + signed((number + 1) * GOLDEN_GAMMA % 2**64))
    return mix(keys + (number + 1) * GOLDEN_GAMMA)


def random_bits(keys: Tensor, first: int, count: int) -> Tensor:
    """keys (n,) → (n, count) of 63 random bits each: the numbers ``first`` to ``first`` + ``count`` of each key's sequence."""
    return derive(keys[:, None], torch.arange(first, first + count, device=keys.device)).bitwise_and_(2**63 - 1)
