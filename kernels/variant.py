"""One compilation of a Triton kernel, the same in `kernels.aot`, which needs no GPU, and in a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with its argument types and launch options.

    Attributes:
        kernel: the function that `triton.jit` made.
        name: tells this variant from the kernel's others, such as ``bf16 dqk=64 dv=64``.
        types: the type of each argument that is no constant, in Triton's notation, such as ``*bf16`` or ``i32``.
        constants: the values of the constexpr arguments.
        num_warps, num_stages: of the launch.
        multiples_of_16: the integer arguments that are such in use, which lets loads be wide; Triton finds it at a launch.
        pairs: that a program covers in one pass of its innermost product loop: (query, key) pairs, slots × hidden units or
            tokens × items; 0: the loop is not counted.
        flops_per_pair: what the products of that loop need for a pair, 2 a multiply-add.
        tiles_for: 80 or 90: only GPUs of this compute capability, or from 90 on, launch these tiles; 0: all GPUs do.
    """

    kernel: Any
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    multiples_of_16: tuple[str, ...] = ()
    pairs: int = 0
    flops_per_pair: int = 0
    tiles_for: int = 0

    def serves(self, arch: int) -> bool:
        """Whether GPUs of compute capability ``arch`` launch this variant."""
        return self.tiles_for in (0, 90 if arch >= 90 else 80)
