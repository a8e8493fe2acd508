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
        archs: the compute capabilities whose tiles these are; 80 stands for all below 90, 90 for all from 90 on.
        pairs: that a program covers in one pass of its innermost product loop: (query, key) pairs, slots × hidden units or
            tokens × items; 0: the loop is not counted.
        flops_per_pair: what the products of that loop need for a pair, 2 a multiply-add.
    """

    kernel: Any
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    multiples_of_16: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90)
    pairs: int = 0
    flops_per_pair: int = 0

    def runs_on(self, arch: int) -> bool:
        """Whether a GPU of this compute capability launches it."""
        return (90 if arch >= 90 else 80) in self.archs
