"""The compilations of relative attention that are in use: the widths and dtypes of the configurations in `configs/`
and of the benchmark."""

from __future__ import annotations

from typing import Any

from kernels.relative_attention import triton_kernels
from kernels.relative_attention.triton_form import LaunchConfig
from kernels.variant import Variant

BIAS_GRADIENT_KERNELS = (triton_kernels.backward_time_kernel, triton_kernels.backward_position_kernel)
KERNELS = (
    triton_kernels.forward_kernel,
    triton_kernels.backward_query_kernel,
    triton_kernels.backward_key_kernel,
    *BIAS_GRADIENT_KERNELS,
)
# (dtype, bytes, precision of products, groups, dqk, dv): 4 views of 16, one table of 50 (FuXi-α's) and heads of 64, 128
# and 256 columns; float32 with TF32 and with exact products; one float16, whose widths differ.
SHAPES = (
    ("bf16", 2, "ieee", 4, 16, 16),
    ("bf16", 2, "ieee", 1, 50, 50),
    ("bf16", 2, "ieee", 1, 64, 64),
    ("bf16", 2, "ieee", 1, 128, 128),
    ("bf16", 2, "ieee", 1, 256, 256),
    ("fp16", 2, "ieee", 1, 32, 64),
    ("fp32", 4, "tf32", 4, 16, 16),
    ("fp32", 4, "tf32", 1, 50, 50),
    ("fp32", 4, "tf32", 1, 64, 64),
    ("fp32", 4, "tf32", 1, 128, 128),
    ("fp32", 4, "tf32", 1, 256, 256),
    ("fp32", 4, "ieee", 4, 16, 16),
    ("fp32", 4, "ieee", 1, 50, 50),
    ("fp32", 4, "ieee", 1, 64, 64),
    ("fp32", 4, "ieee", 1, 128, 128),
)
OF_DTYPE = ("p_q", "p_k", "p_v", "p_out", "p_grad", "p_dq", "p_dk", "p_dv")
INT64 = ("p_offsets", "p_times", "p_items")


def aot_variants() -> list[Variant]:
    """Every kernel for every shape."""
    return [_variant(kernel, *shape) for shape in SHAPES for kernel in KERNELS]


def _variant(kernel: Any, dtype: str, itemsize: int, precision: str, groups: int, dqk: int, dv: int) -> Variant:
    config = LaunchConfig.choose(groups, dqk, dv, itemsize, precision)
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
    exact = " exact" if dtype == "fp32" and precision == "ieee" else ""
    name = f"{dtype}{exact} G={groups} dqk={dqk} dv={dv}"
    pairs = config.block * (config.block if kernel is triton_kernels.backward_position_kernel else config.step)
    return Variant(
        kernel, name, types, constants, launch["num_warps"], launch["num_stages"],
        pairs=pairs, flops_per_pair=_flops_per_pair(kernel, config.groups, dqk, dv),
    )  # fmt: skip


def _flops_per_pair(kernel: Any, groups: int, dqk: int, dv: int) -> int:
    """Of the products in one pass of the kernel's innermost loop, for all groups of a program."""
    if kernel in BIAS_GRADIENT_KERNELS:
        return 2 * dv
    columns = {
        triton_kernels.forward_kernel: groups * (dqk + 3 * dv),
        triton_kernels.backward_query_kernel: 2 * dqk + dv,
        triton_kernels.backward_key_kernel: groups * (2 * dqk + 4 * dv),
    }
    return 2 * columns[kernel]
