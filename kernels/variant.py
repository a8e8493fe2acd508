"""One compilation of a Triton kernel, as `kernels.aot` compiles it without a GPU and as a launch would on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with its argument types and launch options.

    Attributes:
        kernel: the function that `triton.jit` made.
        name: what tells this variant from the kernel's others, such as ``bf16 dqk=64 dv=64``.
        types: of each argument that is no constant, in Triton's words, such as ``*bf16`` or ``i32``.
        constants: of the constexpr arguments.
        num_warps, num_stages: of the launch.
        multiples_of_16: the integer arguments that are such in use, which lets loads be wide; Triton finds it at a launch.
    """

    kernel: Any
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    multiples_of_16: tuple[str, ...] = ()
