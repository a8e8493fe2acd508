"""The compilations of relative attention for the widths and dtypes of the configurations in `configs/` and of the benchmark."""

from __future__ import annotations

from typing import Any

from kernels.relative_attention import triton_bias_kernels as bias
from kernels.relative_attention import triton_semantic_kernels as semantic
from kernels.relative_attention.triton_form import Launch, LaunchConfig, column_blocks
from kernels.variant import Variant

# (dtype, bytes, precision of products, groups, dqk, dv): 4 views of 16, one table of 50 as in FuXi-α, and heads of 64, 128
# and 256 columns; float32 with TF32 and with exact products; float16 with dqk and dv that differ.
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
OF_DTYPE = ("p_q", "p_k", "p_v", "p_out", "p_grad", "p_dq", "p_dk", "p_dv", "p_positions")
INTEGERS = {
    "p_offsets": "*i64",
    "p_items": "*i64",
    "p_cells": "*i64",
    "p_lookup": "*i64",
    "p_times": "*i32",
    "p_selects": "*i32",
    "p_code_thresholds": "*i32",
    "p_counts": "*i32",
    "p_tile_counts": "*i32",
    "p_codes": "*i16",
    "p_tiles": "*i16",
}
# These kernels are launched a second time for sequences whose times span 2³¹ s.
OF_TIMES = (bias.bias_forward_kernel, bias.bias_value_kernel, bias.time_gradient_kernel)


def aot_variants() -> list[Variant]:
    """Every kernel for every shape and compute capability."""
    return [variant for shape in SHAPES for arch in (80, 90) for variant in shape_variants(arch, *shape)]


def shape_variants(
    arch: int, dtype: str, itemsize: int, precision: str, groups: int, dqk: int, dv: int, *, wide_times: bool = True
) -> list[Variant]:
    """The variants that forward and backward launch for one shape; ``wide_times`` adds those for times that span 2³¹ s."""
    config = LaunchConfig.choose(groups, dqk, dv, itemsize, precision, arch)
    exact = " exact" if dtype == "fp32" and precision == "ieee" else ""
    name = f"{dtype}{exact} G={groups} dqk={dqk} dv={dv}"
    columns, gradient = config.columns, config.gradient
    # Kernel, launch, number of columns of its products.
    launches: list[tuple[Any, Launch, int]] = [
        (bias.tables_kernel, Launch(config.block, 4, 1), 0),
        (bias.value_sums_kernel, gradient, 0),
        (semantic.semantic_forward_kernel, config.forward, dqk + dv),
        (semantic.semantic_query_kernel, config.query, 2 * dqk + dv),
        (semantic.semantic_key_kernel, config.key, 2 * dqk + 2 * dv),
        (bias.bias_forward_kernel, config.bias_forward, 2 * columns),
        (bias.bias_value_kernel, config.bias_value, 2 * columns),
        (bias.time_gradient_kernel, gradient, column_blocks(groups, dv, config) * columns),
        (bias.position_gradient_kernel, gradient, column_blocks(groups, dv, config) * columns),
    ]
    variants = []
    for kernel, launch, width in launches:
        values: dict[str, Any] = {
            "DQK": dqk,
            "DV": dv,
            "COLUMNS": columns,
            "COLUMN_BLOCKS": column_blocks(groups, dv, config),
            "BLOCK": config.block,
            "STEP": launch.step,
            "PRECISION": precision,
        }
        constants = {argument: value for argument, value in values.items() if argument in kernel.arg_names}
        step = constants.get("STEP", config.block)
        for wide in (False, True) if wide_times and kernel in OF_TIMES else (False,):
            types = _types(kernel, dtype, constants) | ({"p_times": "*i64"} if wide else {})
            variant = Variant(
                kernel, f"{name} wide" if wide else name, types, constants, launch.num_warps, launch.num_stages,
                archs=(arch,), pairs=config.block * step if width else 0, flops_per_pair=2 * width,
            )  # fmt: skip
            variants.append(variant)
    return variants


def _types(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in OF_DTYPE:
            types[name] = f"*{dtype}"
        elif name not in constants:
            types[name] = INTEGERS.get(name, "*fp32" if name.startswith("p_") else "i32")
    return types
