"""Compiles kernel variants for a GPU that need not be there, exactly as a launch on it would.

Triton keeps what it compiles in a folder (`TRITON_CACHE_DIR`), under a key of source, types, constants, alignment and options. A
launch with the same key loads it from there instead of compiling, so `fill_cache` takes the compilations out of the first
training step, and makes them at once instead of one after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.variant import Variant


def source(variant: Variant) -> ASTSource:
    """What a launch of the variant hands to the compiler: the same object, so that both have one key in Triton's cache."""
    names = variant.kernel.arg_names
    attributes: dict[tuple[int], list[Any]] = {}
    for parameter in variant.kernel.params:
        kind = variant.types.get(parameter.name, "constexpr")
        if kind == "constexpr":
            attributes[parameter.num,] = []
        elif kind[0] in "*i" and not parameter.do_not_specialize:
            divisible = kind[0] == "*" or parameter.name in variant.multiples_of_16  # torch's allocations are aligned
            attributes[parameter.num,] = [["tt.divisibility", 16]] if divisible else []
    return ASTSource(
        variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs={(i,): variant.constants[name] for i, name in enumerate(names) if name in variant.constants},
        attrs=attributes,
    )


def compiled(variant: Variant, arch: int) -> Any:
    """Triton's compiled kernel for a GPU of compute capability ``arch``, such as 90; from its cache where it is there."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source(variant), target=GPUTarget("cuda", arch, 32), options=options)


def fill_cache(variants: Iterable[Variant], arch: int, workers: int) -> int:
    """Compiles the variants that ``arch`` launches, ``workers`` at a time; returns how many there are.

    Threads suffice: Triton's passes, LLVM and ptxas run without Python's lock.
    """
    chosen = [variant for variant in variants if variant.runs_on(arch)]
    with ThreadPoolExecutor(max(1, workers)) as executor:
        for _ in executor.map(lambda variant: compiled(variant, arch), chosen):
            pass
    return len(chosen)
