"""The compilations of relative attention that are in use: the widths and dtypes of the configurations in `configs/`
and of the benchmark."""

from __future__ import annotations

from typing import Any

from kernels.relative_attention import triton_kernels
from kernels.relative_attention.triton_op import LaunchConfig
from kernels.variant import Variant

BIAS_GRADIENT_KERNELS = (triton_kernels.backward_time_kernel, triton_kernels.backward_position_kernel)
KERNELS = (
    triton_kernels.forward_kernel,
    triton_kernels.backward_query_kernel,
    triton_kernels.backward_key_kernel,
    *BIAS_GRADIENT_KERNELS,
)
# (groups, dqk, dv): 4 views of 16; one table of 50, FuXi-α's; heads of 32, 64, 128 and the widest.
SHAPES = ((4, 16, 16), (1, 50, 50), (2, 32, 32), (1, 64, 64), (1, 128, 128), (1, 256, 256))
DTYPES = (("bf16", 2, "ieee"), ("fp32", 4, "tf32"))
OF_DTYPE = ("p_q", "p_k", "p_v", "p_out", "p_grad", "p_dq", "p_dk", "p_dv")
INT64 = ("p_offsets", "p_times", "p_items")


def aot_variants() -> list[Variant]:
    """Every kernel for every shape and dtype; float32 with TF32 products."""
    return [
        _variant(kernel, dtype, precision, shape, LaunchConfig.choose(*shape, itemsize))
        for shape in SHAPES
        for dtype, itemsize, precision in DTYPES
        for kernel in KERNELS
    ]


def _variant(kernel: Any, dtype: str, precision: str, shape: tuple[int, int, int], config: LaunchConfig) -> Variant:
    groups, dqk, dv = shape
    values = {
        "DQK": dqk,
        "DV": dv,
        "GROUPS": config.groups,
        "BLOCK": config.block,
        "STEP": config.step,
        "PRECISION": precision,
    }
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in values:
            constants[name] = values[name]
        elif name in OF_DTYPE:
            types[name] = f"*{dtype}"
        elif name in INT64:
            types[name] = "*i64"
        elif name == "p_counts":
            types[name] = "*i32"
        else:
            types[name] = "*fp32" if name.startswith("p_") else "i32"
    launch = config.launch(bias_gradient=kernel in BIAS_GRADIENT_KERNELS)
    return Variant(kernel, f"{dtype} G={groups} dqk={dqk} dv={dv}", types, constants, **launch)
