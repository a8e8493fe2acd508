"""One compilation of a Triton kernel. `kernels.aot`, which needs no GPU, and a launch make the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with its argument types and launch options.

    Attributes:
        kernel: the function that `triton.jit` made.
        name: distinguishes this variant from others of the kernel, such as ``bf16 dqk=64 dv=64``.
        types: the types of the arguments that are not constants, in Triton's notation, such as ``*bf16`` or ``i32``.
        constants: the values of the constexpr arguments.
        num_warps, num_stages: launch options.
        multiples_of_16: the integer arguments whose values are multiples of 16, which permits wide loads. At a launch Triton
            finds them by itself.
        archs: the compute capabilities that launch this variant; 80 means all below 90, 90 means 90 and above.
        pairs: number of pairs that a program covers in one pass of its innermost product loop: (query, key), (slot, hidden
            unit) or (token, item); 0: the loop is not counted.
        flops_per_pair: FLOPs that the products of that loop need per pair, 2 per multiply-add.
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
