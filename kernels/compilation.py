"""Compiles kernel variants exactly as a launch would, also for a GPU that this machine does not have.

Triton caches compiled kernels in a folder (`TRITON_CACHE_DIR`) by source, types, constants, alignment and options. A launch with
the same key loads the kernel from there. So `fill_cache` moves compilation out of the first training step and compiles many
kernels at the same time.
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
    """The source that a launch of the variant compiles; it has the same key in Triton's cache."""
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
    """Triton's compiled kernel for a GPU of compute capability ``arch``, such as 90; from the cache if it is there."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(source(variant), target=GPUTarget("cuda", arch, 32), options=options)


def fill_cache(variants: Iterable[Variant], arch: int, workers: int) -> int:
    """Compiles the variants that ``arch`` launches, ``workers`` at a time, and returns their number.

    Threads suffice, because Triton's passes, LLVM and ptxas release Python's lock.
    """
    chosen = [variant for variant in variants if variant.runs_on(arch)]
    with ThreadPoolExecutor(max(1, workers)) as executor:
        for _ in executor.map(lambda variant: compiled(variant, arch), chosen):
            pass
    return len(chosen)
