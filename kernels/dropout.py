"""Dropout that depends only on a key per row, so that it is the same on every device and on any number of processes.

The key of a row is a random int64 x (`kernels.splitmix`). Each block j of four columns has an odd multiplier a_j. One word z
holds sixteen bits for each of these columns, the lowest bits for the first:

    z = x · a_j;    z ← (z ⊕ (z ≫ 32)) · c        in int64, with an arithmetic shift

An element is dropped if its sixteen bits, as an int16, are below p · 2¹⁶ − 2¹⁵. The first product spreads x over the high
bits, and the shift moves these to the low bits for the second product. On a CPU this takes less work for four elements than
one draw of torch's generator. The Triton form of the norms computes the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.splitmix import derive, signed

DROPOUT_STEPS = 65_536
FACTOR = signed(0xD6E8FEB86659FD93)
WORDS_AT_ONCE = 1 << 15  # on a CPU; they stay in a core's cache


def dropout(x: Tensor, p: float, keys: Tensor | None) -> Tensor:
    """Sets each element of ``x`` to zero with probability ``p``, in steps of 2⁻¹⁶, and divides the others by 1 − ``p``.

    Args:
        x: (..., w).
        keys: (...,) int64, see `kernels.splitmix`; may be None only if p = 0.

    Raises:
        ValueError: the keys are missing or do not fit ``x``.
    """
    dropped = dropout_steps(p)
    if not dropped:
        return x
    keys = checked_keys(keys, x)
    mask, scale = dropout_mask(keys.flatten(), x.shape[-1], dropped)
    return x * mask.view(x.shape) * scale


def dropout_steps(p: float) -> int:
    """``p`` in steps of 2⁻¹⁶, at most 2¹⁶ − 1, so that 1 − p is not 0."""
    return min(round(p * DROPOUT_STEPS), DROPOUT_STEPS - 1)


def checked_keys(keys: Tensor | None, x: Tensor) -> Tensor:
    """``keys``; raises ValueError unless there is one for each row of ``x``."""
    if keys is None:
        raise ValueError("dropout_keys are required if the dropout probability is not 0")
    if keys.shape != x.shape[:-1] or keys.dtype != torch.int64 or keys.device != x.device:
        raise ValueError(
            f"dropout_keys have shape {tuple(keys.shape)} and dtype {keys.dtype} on {keys.device}, expected "
            f"{tuple(x.shape[:-1])} and torch.int64 on {x.device}"
        )
    return keys


def dropout_mask(keys: Tensor, width: int, dropped: int) -> tuple[Tensor, float]:
    """keys (R,) → (R, width) uint8, 1 where an element is kept, and the factor that scales the kept ones.

    The mask is uint8 because products with bool take four times as long on a CPU.
    """
    num_words = -(-width // 4)
    multipliers = derive(keys.new_zeros(num_words), torch.arange(num_words, device=keys.device)) | 1
    scale, least = DROPOUT_STEPS / (DROPOUT_STEPS - dropped), dropped - DROPOUT_STEPS // 2
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        return (_words(keys, multipliers)[:, :width] >= least).view(torch.uint8), scale
    mask = torch.empty(keys.numel(), width, dtype=torch.bool)
    rows = max(1, WORDS_AT_ONCE // max(1, num_words))
    for part, out in zip(keys.split(rows), mask.split(rows), strict=True):
        torch.ge(_words(part, multipliers)[:, :width], least, out=out)
    return mask.view(torch.uint8), scale


def _words(keys: Tensor, multipliers: Tensor) -> Tensor:
    """(R, 4 · words) int16."""
    words = keys[:, None] * multipliers
    words = words.bitwise_xor_(words >> 32).mul_(FACTOR)
    return words.view(torch.int16)
