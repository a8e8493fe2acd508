"""Finds the compilations that launches request, without a GPU. As a program, it prints those of one operation.

    python -m tests.kernels.launches experts

`recorded` replaces the `run` of Triton's kernels by one that derives, as Triton does, what it would compile for an H100, and
launches nothing. It does not work under TRITON_INTERPRET=1, which makes kernels of another kind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import kernels
import kernels.backend
from kernels.compilation import source
from kernels.expert_ffn import variants as expert_variants
from kernels.gated_rms_norm import triton_form as norm_form
from kernels.relative_attention import api as attention_api
from kernels.relative_attention import variants as attention_variants
from kernels.sampled_softmax import variants as softmax_variants
from kernels.silu_split import triton_form as split_form
from kernels.variant import Variant

ARCH = 90
TARGET = GPUTarget("cuda", ARCH, 32)


def key(compiled: ASTSource, options: dict[str, Any]) -> str:
    """The readable properties that identify a compilation, and its keys in Triton's cache."""
    parsed = make_backend(TARGET).parse_options(options)
    shown = [compiled.fn.__name__, compiled.signature, [str(value) for value in compiled.constants.values()]]
    return json.dumps([*shown, str(compiled.attrs), options, compiled.hash(), parsed.hash()])


def described(variant: Variant) -> str:
    """The compilations of `kernels.aot` and `kernels.compilation`."""
    return key(source(variant), {"num_stages": variant.num_stages, "num_warps": variant.num_warps})


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Collects the compilations that launches in the context request. Operators run on CPU tensors; results are zeros."""
    backend, asked = make_backend(TARGET), set()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*arguments, **named)
        _, signature, constants, attributes = self._pack_args(backend, named, bound, specialization, options)
        asked.add(key(ASTSource(self, signature, constants, attributes), dict(sorted(options.items()))))

    def triton(*_: Any) -> str:
        return "triton"

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(kernels.backend, "resolve_backend", triton),
        mock.patch.object(attention_api, "resolve_backend", triton),
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
    ):
        yield asked


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)


def attention(tokens: int) -> list[Variant]:
    offsets = torch.tensor([0, tokens])
    q, k, v = (normal(4, tokens, 16) for _ in range(3))
    times = torch.arange(tokens + 1) * 2**33  # wide: kernels of int64 times are launched too
    weights = torch.randn(129), torch.randn(2 * tokens - 1)
    kernels.relative_attention(q, k, v, offsets, tokens, times, *weights, backend="triton").sum().backward()
    return [v for v in attention_variants.aot_variants() if v.name.startswith("bf16 G=4 dqk=16 dv=16")]


def experts(tokens: int) -> list[Variant]:
    """Rows on chip and in two passes, without and with routing."""
    num_experts = expert_variants.NUM_EXPERTS
    options: dict[str, Any] = {"backend": "triton", "check_offsets": False}
    for dim in (16, 256, 512):
        weights = [
            normal(num_experts, dim, 4 * dim),
            normal(num_experts, dim, 4 * dim),
            normal(num_experts, 4 * dim, dim),
        ]
        offsets = torch.tensor([0] * num_experts + [tokens])
        kernels.expert_ffn(normal(tokens, dim), offsets, *weights, **options).sum().backward()
        if dim == 16:
            order, choices = torch.arange(2 * tokens), torch.rand(tokens, 2, requires_grad=True)
            kernels.routed_expert_ffn(
                normal(tokens, dim), order, choices, 2 * offsets, *weights, **options
            ).sum().backward()
    names = ("bf16 d=16 top_k=0", "bf16 d=16 top_k=2", "bf16 sum")
    return [
        v for v in expert_variants.aot_variants() if v.name in names or v.name.startswith(("bf16 d=256", "bf16 d=512"))
    ]


def softmax(tokens: int) -> list[Variant]:
    """Own and shared negatives, without and with the items' biases."""
    for group_size in (1, 64):
        groups = -(-tokens // group_size)
        for bias in (None, torch.randn(300)):
            hidden, items = normal(tokens, 64), normal(300, 64)
            targets, negatives = torch.randint(300, (tokens,)), torch.randint(300, (groups, 128))
            kernels.sampled_softmax_loss(
                hidden,
                items,
                targets,
                negatives,
                group_size=group_size,
                temperature=0.05,
                item_bias=bias,
                backend="triton",
            ).sum().backward()
    names = ("sampled softmax bf16 D=64", "sampled softmax bf16 D=64 ieee g=64")
    return [v for v in softmax_variants.aot_variants() if v.name.removesuffix(" bias") in names]


def elementwise(tokens: int) -> list[Variant]:
    """Norms without and with gate and dropout, and the split SiLU."""
    for dropout_p in (0.0, 0.2):
        keys = torch.arange(tokens) if dropout_p else None
        options: dict[str, Any] = {"dropout_p": dropout_p, "dropout_keys": keys, "backend": "triton"}
        kernels.rms_norm(normal(tokens, 64), **options).sum().backward()
        kernels.gated_rms_norm(normal(tokens, 64), normal(tokens, 64), **options).sum().backward()
    parts = kernels.silu_split(normal(tokens, 6 * 64), 1, 1, 64, 64, backend="triton")
    sum(part.sum() for part in parts).backward()
    return [
        *(v for v in norm_form.aot_variants() if v.name.startswith("bf16 w=64")),
        *(v for v in split_form.aot_variants() if v.name == "bf16 H=1 dqk=64 dv=64"),
    ]


OPERATIONS = {"attention": attention, "experts": experts, "softmax": softmax, "elementwise": elementwise}


def main(operation: str) -> None:
    torch.manual_seed(0)
    with recorded() as launched:
        for tokens in (128, 61, 80):
            compiled = OPERATIONS[operation](tokens)
    found = {"launched": sorted(launched), "compiled": [described(v) for v in compiled if v.runs_on(ARCH)]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
