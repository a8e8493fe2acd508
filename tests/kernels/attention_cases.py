"""Jagged batches for the tests of relative attention, and the comparison of its forms with the definition.

Tolerances are relative to the norm of the reference in float64: about 30 rounding errors of float32; for bfloat16 and float16
twice the error of the definition in that dtype (see `test_relative_attention_triton.py`). In gradients of few elements, terms may
cancel to less than a tenth of the sum of their sizes; then tolerances are relative to that tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.relative_attention.reference import relative_attention_reference

OPERANDS = ("q", "k", "v", "ts_weights", "pos_weights")
NAMES = ("output", "grad q", "grad k", "grad v", "grad ts_weights", "grad pos_weights")


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    seq_offsets: Tensor
    max_seq_len: int
    timestamps: Tensor
    ts_weights: Tensor
    pos_weights: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        floats = {
            name: x.to(dtype) for name, x in vars(self).items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        return replace(self, **floats)

    def sizes(self) -> Case:
        """All numbers positive, so that no term cancels another."""
        return replace(self, **{name: getattr(self, name).abs() for name in (*OPERANDS, "grad")})


def make_case(
    lengths: list[int],
    *,
    groups: int = 1,
    dqk: int = 8,
    dv: int = 8,
    max_seq_len: int | None = None,
    timestamps: Tensor | None = None,
    longest_step: float = 15.0,
    seed: int = 0,
) -> Case:
    """A float64 case of random values. Unless given, times rise by random steps of up to e^longest_step seconds."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    seq_offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    num_tokens = int(seq_offsets[-1])
    max_seq_len = max_seq_len or max([1, *lengths])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    if timestamps is None:
        steps = torch.exp(
            longest_step * torch.rand(num_tokens + len(lengths), generator=random, dtype=torch.float64)
        ).long()
        timestamps = 1_500_000_000 + steps.cumsum(0)
    return Case(
        normal(groups, num_tokens, dqk),
        normal(groups, num_tokens, dqk),
        normal(groups, num_tokens, dv),
        seq_offsets,
        max_seq_len,
        timestamps,
        normal(129),
        normal(2 * max_seq_len - 1),
        normal(groups, num_tokens, 3 * dv),
    )


def times_of_every_bucket() -> Tensor:
    """Rising int64 times whose differences from the first reach every time bucket except 1, which has no whole second."""
    return torch.cat([torch.zeros(1), torch.exp(0.301 * (torch.arange(129.0, dtype=torch.float64) + 0.9))]).long()


def results(attention: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """The output and the five gradients, in the order of NAMES."""
    leaves = [getattr(case, name).detach().clone().requires_grad_() for name in OPERANDS]
    q, k, v, ts_weights, pos_weights = leaves
    y = attention(q, k, v, case.seq_offsets, case.max_seq_len, case.timestamps, ts_weights, pos_weights)
    gradients = torch.autograd.grad(y, leaves, case.grad, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """‖found − expected‖ / ‖expected‖ of each result in float64, or ‖found‖ if the reference is zero."""
    errors = []
    for x, reference in zip(found, expected, strict=True):
        assert x.shape == reference.shape
        scale = reference.double().norm().item()
        errors.append((x.double() - reference.double()).norm().item() / (scale or 1.0))
    return errors


def assert_agrees(attention: Callable[..., Tensor], case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Compares the output and every gradient of ``case`` in ``dtype`` with the definition in float64."""
    low = case.to(dtype)
    exact = low.to(torch.float64)
    expected = results(relative_attention_reference, exact)
    errors = relative_errors(results(attention, low), expected)
    if max(errors) > tolerance:
        terms = results(relative_attention_reference, exact.sizes())
        shares = [(x.norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(expected, terms, strict=True)]
        errors = [error * min(1.0, 10 * share) for error, share in zip(errors, shares, strict=True)]
    for name, error in zip(NAMES, errors, strict=True):
        assert error <= tolerance, f"{name}: relative error {error:.2e} over {tolerance:.0e}"
