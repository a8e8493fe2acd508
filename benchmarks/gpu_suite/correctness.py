"""Checks every kernel on this device: forward and every gradient against float64, and that two runs give the same bits.

The error of a result is its distance from the float64 result, relative to the norm. It may be twice that of the PyTorch form in
the same dtype plus one rounding error of a 16-bit dtype or thirty of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

Form = Callable[..., Sequence[Tensor]]  # (backend, *inputs) → results


def comparisons(
    dtype: torch.dtype, device: torch.device, dry: bool
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The name of each operation and shape, and its comparison, which raises if the kernel is wrong."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=random)).to(device, dtype)

    makers = (_attention, _experts, _softmax, _elementwise)
    for name, form, inputs in (case for make in makers for case in make(normal, random, device, dry)):
        yield name, functools.partial(compare, form, inputs)


def compare(form: Form, inputs: list[Tensor]) -> dict[str, Any]:
    """The errors of the Triton form and of the PyTorch form in the inputs' dtype.

    Raises:
        ArithmeticError: an error is too large, or two runs differ.
    """
    outputs = form("torch", *(x.double() for x in inputs))
    upstream = [torch.randn_like(y).to(inputs[0].dtype) for y in outputs]
    exact = _results(form, "torch", [x.double() for x in inputs], [g.double() for g in upstream])
    eager = _errors(_results(form, "torch", inputs, upstream), exact)
    first, second = (_results(form, "triton", inputs, upstream) for _ in range(2))
    errors = _errors(first, exact)
    band = torch.finfo(inputs[0].dtype).eps * (30 if inputs[0].dtype == torch.float32 else 1)
    same_bits = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wrong = [i for i, (found, allowed) in enumerate(zip(errors, eager, strict=True)) if not found <= 2 * allowed + band]
    if wrong or not same_bits:
        what = f"results {wrong} of {len(errors)} are wrong" if wrong else "two runs differ"
        raise ArithmeticError(f"{what}: errors {_short(errors)}, of the PyTorch form {_short(eager)}")
    return {"errors": errors, "errors_of_pytorch": eager, "same_bits": same_bits}


def _results(form: Form, backend: str, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = form(backend, *leaves)
    gradients = torch.autograd.grad(
        list(outputs), leaves, [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
    )
    return [*(y.detach() for y in outputs), *gradients]


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)).item() for x, y in pairs]


def _short(errors: list[float]) -> str:
    return "[" + ", ".join(f"{error:.1e}" for error in errors) + "]"


Normal = Callable[..., Tensor]
Case = tuple[str, Form, list[Tensor]]


def _attention(normal: Normal, random: torch.Generator, device: torch.device, dry: bool) -> Iterator[Case]:
    """Lengths around the edges of a block, empty histories, times that step back, span 2³¹ s or are all equal."""
    lengths = torch.tensor([3, 0, 9] if dry else [300, 0, 1, 63, 64, 65, 128, 200])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    tokens, longest = int(offsets[-1]), int(lengths.max())
    steps = torch.exp(13 * torch.rand(tokens + len(lengths), generator=random)).long()
    steps[tokens // 2] = -50_000
    times = 1_500_000_000 + steps.cumsum(0)
    kinds = {"": times, ", 2³¹ s": times + 2**31 * (torch.arange(len(times)) > tokens // 3), ", one moment": 0 * times}
    shapes = ((2, 8),) if dry else ((1, 64), (2, 128), (4, 16), (1, 50))
    for groups, width in shapes:
        for kind, stamps in kinds.items() if (groups, width) == shapes[0] else [("", times)]:
            q, k, v = (normal(groups, tokens, width, scale=0.3) for _ in range(3))
            given: Any = (offsets.to(device), longest, stamps.to(device))

            def form(
                backend: str, q: Tensor, k: Tensor, v: Tensor, ts: Tensor, pos: Tensor, given: Any = given
            ) -> list[Tensor]:
                seq_offsets, longest, stamps = given
                return [kernels.relative_attention(q, k, v, seq_offsets, longest, stamps, ts, pos, backend=backend)]

            yield f"attention {groups}x{width}{kind}", form, [q, k, v, normal(129), normal(2 * longest - 1)]


def _experts(normal: Normal, random: torch.Generator, device: torch.device, dry: bool) -> Iterator[Case]:
    """Skewed routing with an expert that gets no rows; widths that fit on chip, and wider ones in two passes."""
    rows, num_experts = (10, 3) if dry else (1000, 8)
    for dim in (8,) if dry else (16, 50, 64, 128, 256, 512):
        likes = torch.arange(num_experts).float()  # expert 0 is never chosen
        choices = torch.multinomial(likes.expand(rows, -1), 2, generator=random).flatten()
        order = torch.argsort(choices, stable=True).to(device)
        offsets = F.pad(torch.bincount(choices, minlength=num_experts).cumsum(0), (1, 0)).to(device)
        weights = [normal(num_experts, dim, 4 * dim, scale=dim**-0.5) for _ in range(2)]
        weights.append(normal(num_experts, 4 * dim, dim, scale=(4 * dim) ** -0.5))
        routing = order, torch.rand(rows, 2, generator=random).to(device), offsets

        def routed(backend: str, x: Tensor, *weights: Tensor, routing: Any = routing) -> list[Tensor]:
            return [kernels.routed_expert_ffn(x, *routing, *weights, backend=backend)]

        yield f"experts d={dim}, routed", routed, [normal(rows, dim), *weights]


def _softmax(normal: Normal, random: torch.Generator, device: torch.device, dry: bool) -> Iterator[Case]:
    tokens, items, count = (20, 12, 5) if dry else (1000, 700, 128)
    for width in (8,) if dry else (50, 64, 256):
        for group_size, biased in ((1, False), (64, False), (64, True), (0, False)):
            groups = -(-tokens // (group_size or tokens))
            targets = torch.randint(items, (tokens,), generator=random).to(device)
            negatives = torch.randint(items, (groups, count), generator=random).to(device)
            bias = torch.randn(items, generator=random).to(device) if biased else None

            def form(
                backend: str, hidden: Tensor, items: Tensor, given: Any = (targets, negatives), size: int = group_size,
                bias: Tensor | None = bias,
            ) -> list[Tensor]:  # fmt: skip
                return [
                    kernels.sampled_softmax_loss(
                        hidden, items, *given, group_size=size, temperature=0.05, item_bias=bias, backend=backend
                    )
                ]

            hidden, vectors = (normal(rows, width, scale=width**-0.5) for rows in (tokens, items))
            yield f"softmax D={width}, groups of {group_size}{', bias' if biased else ''}", form, [hidden, vectors]


def _elementwise(normal: Normal, random: torch.Generator, device: torch.device, dry: bool) -> Iterator[Case]:
    rows = 12 if dry else 1000
    for width in (8,) if dry else (50, 64, 192, 1024):
        keys = torch.randint(2**62, (rows,), generator=random).to(device)

        def norm(backend: str, a: Tensor) -> list[Tensor]:
            return [kernels.rms_norm(a, backend=backend)]

        def gated(backend: str, u: Tensor, a: Tensor, keys: Tensor = keys) -> list[Tensor]:
            return [kernels.gated_rms_norm(u, a, dropout_p=0.2, dropout_keys=keys, backend=backend)]

        yield f"norm, width {width}", norm, [normal(rows, width)]
        yield f"gated norm with dropout, width {width}", gated, [normal(rows, width), normal(rows, width)]
    for heads, width in ((2, 8),) if dry else ((1, 16), (1, 50), (2, 64)):

        def split(backend: str, projected: Tensor, heads: int = heads, width: int = width) -> Sequence[Tensor]:
            return kernels.silu_split(projected, 4, heads, width, width, backend=backend)

        yield f"split SiLU {heads}x{width}", split, [normal(rows, 6 * heads * width)]
