"""PyTorch's attention kernels at the shapes of ours. They compute something else, but show what similar work can reach here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline import timed

if TYPE_CHECKING:
    from benchmarks.gpu_suite.stages import Stage


def dot_product_attention(stage: Stage, groups: int, width: int) -> list[dict[str, Any]]:
    """Causal softmax attention on sequences of N, with the products q kᵀ and A v in forward and five in backward."""
    q, k, v = _operands(stage, groups, width)
    form = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    return _passes(stage, form, [q, k, v], {"forward": 2, "backward": 5})


def flex_attention(stage: Stage, groups: int, width: int) -> list[dict[str, Any]]:
    """Causal softmax attention with a positional bias that is looked up for each pair; compiled on a GPU."""
    from torch.nn.attention import flex_attention as flex

    longest = stage.longest
    q, k, v = _operands(stage, groups, width)
    if stage.dry:  # on a CPU flex_attention has no backward and rejects operands that require gradients
        q, k, v = (x.detach() for x in (q, k, v))
    bias = torch.randn(2 * longest - 1, device=stage.device, dtype=stage.dtype)

    def add_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[j - i + longest - 1]

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = flex.create_block_mask(causal, None, None, longest, longest, device=str(stage.device))
    attend = flex.flex_attention if stage.dry else torch.compile(flex.flex_attention, dynamic=False)
    form = functools.partial(attend, q, k, v, score_mod=add_position, block_mask=mask)
    if stage.dry:
        return [{"pass": "forward", **timed(form, stage.device, stage.seconds)}]
    return _passes(stage, form, [q, k, v], {"forward": 2, "backward": 5})


def _operands(stage: Stage, groups: int, width: int) -> list[Tensor]:
    sequences = max(1, stage.tokens // stage.longest)
    shape = sequences, groups, stage.longest, width
    return [torch.randn(shape, device=stage.device, dtype=stage.dtype, requires_grad=True) for _ in range(3)]


def _passes(
    stage: Stage, form: Callable[[], Tensor], inputs: list[Tensor], products: dict[str, int]
) -> list[dict[str, Any]]:
    sequences, groups, longest, width = inputs[0].shape
    pairs = sequences * groups * longest * (longest + 1) // 2
    with torch.no_grad():
        times = {"forward": timed(form, stage.device, stage.seconds)}
    y = form()
    differentiate = functools.partial(torch.autograd.grad, y, inputs, torch.randn_like(y), retain_graph=True)
    times["backward"] = timed(differentiate, stage.device, stage.seconds)
    rows = []
    for direction, figures in times.items():
        gflop = 2e-9 * pairs * width * products[direction]
        peak = stage.peak()
        rated = {
            "gflop": gflop,
            "tflops": gflop / figures["ms"],
            "of_peak": gflop / figures["ms"] / peak if peak else None,
        }
        rows.append({"longest": longest, "groups": groups, "width": width, "pass": direction} | figures | rated)
    return rows
