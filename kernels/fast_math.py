"""Functions for Triton kernels that use one special-function operation where the compiler's own forms use several.

    sigmoid_and_silu(x)   σ(x) = ½ + ½·tanh(x / 2) and x·σ(x); for bfloat16 operands by `tanh.approx.f32`
    exp2(x)               2ˣ by `ex2.approx.ftz.f32`, which rounds results below 2⁻¹²⁶ to zero

`tanh.approx.f32` has a relative error of at most 2⁻¹¹, so the error of σ is at most 2⁻¹². Rounding to bfloat16 afterwards has
a relative error of up to 2⁻⁹. For other dtypes σ is 1 / (1 + e⁻ˣ), exact up to the rounding of float32.

Triton's interpreter does not run inline assembly. It computes tanh exactly and rounds it to 11 significant bits. This has the
same error bound, so tests in the interpreter see the error that a GPU would make.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.backend import interpreting

if interpreting():

    @triton.jit
    def tanh_approx(x):
        exact = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        bits = exact.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)

    @triton.jit
    def exp2(x):
        return tl.exp2(x)

else:

    @triton.jit
    def tanh_approx(x):
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def exp2(x):
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid_and_silu(x, APPROXIMATE: tl.constexpr):
    """(σ(x), x·σ(x)) of float32 values."""
    if APPROXIMATE:
        half = 0.5 * x
        t = tanh_approx(half)
        return 0.5 + 0.5 * t, half + half * t
    s = 1.0 / (1.0 + tl.exp(-x))
    return s, x * s
