"""The compilations of the expert FFN for the widths and dtypes of the configurations in `configs/` and of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from kernels.expert_ffn import triton_kernels, triton_wide_kernels
from kernels.expert_ffn.triton_form import SUM_TILES, WIDE_INNER, WIDEST_BACKWARD, WIDEST_FORWARD, LaunchConfig, Tiles
from kernels.variant import Variant

NUM_EXPERTS = 8
# (dtype, bytes, precision of products, widths)
SHAPES = (
    ("bf16", 2, "ieee", (16, 32, 50, 64, 100, 128, 256, 512)),
    ("fp32", 4, "tf32", (16, 50, 64, 100, 128, 256, 512)),
    ("fp32", 4, "ieee", (50, 64, 128, 256, 512)),
    ("fp16", 2, "ieee", (64, 512)),
)
FLOAT32 = ("p_partial", "p_choice_weights", "p_d_choice")
NARROW = (triton_kernels.forward_kernel, triton_kernels.backward_rows_kernel, triton_kernels.backward_weights_kernel)


@dataclass(frozen=True)
class _Case:
    """A shape and dtype on one kind of GPU, with the launches for them."""

    arch: int
    dtype: str
    precision: str
    dim: int
    hidden_dim: int
    num_experts: int
    config: LaunchConfig

    @property
    def name(self) -> str:
        exact = " exact" if self.dtype == "fp32" and self.precision == "ieee" else ""
        return f"{self.dtype}{exact} d={self.dim}"


def aot_variants() -> list[Variant]:
    """Every kernel for every width that it supports, with the tiles of each kind of GPU."""
    found = [
        variant
        for arch in (80, 90)
        for dtype, itemsize, precision, dims in SHAPES
        for dim in dims
        for top_k in ((0, 2) if dim <= WIDEST_BACKWARD else (0,))
        for variant in shape_variants(arch, dtype, itemsize, precision, dim, 4 * dim, NUM_EXPERTS, top_k)
    ]
    return list({(variant.kernel, variant.name, variant.archs): variant for variant in found}.values())


def shape_variants(
    arch: int, dtype: str, itemsize: int, precision: str, dim: int, hidden_dim: int, num_experts: int, top_k: int
) -> list[Variant]:
    """The variants that forward and backward launch for one shape; ``top_k`` 0 means no routing, as for all wide rows."""
    config = LaunchConfig.choose(dim, itemsize, precision, arch)
    case = _Case(arch, dtype, precision, dim, hidden_dim, num_experts, config)
    sizes = {"size": dim * hidden_dim}
    total = _variant(case, triton_kernels.sum_chunks_kernel, f"{dtype} sum", {}, SUM_TILES, sizes)
    return [*_narrow_variants(case, top_k), *_wide_variants(case), total]


def _narrow_variants(case: _Case, top_k: int) -> list[Variant]:
    if case.dim > WIDEST_FORWARD:
        return []
    config = case.config
    passes = (
        (config.forward, 6),
        (config.rows, 10),
        (config.weights, 12),
    )  # FLOPs per pair over d, see docs/kernels.md
    constants = {"TOP_K": top_k} | ({} if top_k else {"p_order": None, "p_choice_weights": None})
    kernels = NARROW if case.dim <= WIDEST_BACKWARD else NARROW[:1]
    return [
        _variant(
            case, kernel, f"{case.name} top_k={top_k}", constants, tiles, {"hidden_dim": case.hidden_dim},
            tiles.block * tiles.step, flops * case.dim,
        )
        for kernel, (tiles, flops) in zip(kernels, passes, strict=False)
    ]  # fmt: skip


def _wide_variants(case: _Case) -> list[Variant]:
    """A pass covers only a part of the width, so a pair of it counts as a fraction."""
    dim, hidden_dim, config = case.dim, case.hidden_dim, case.config
    if dim <= WIDEST_BACKWARD:
        return []
    variants = []
    pairs = config.weights.block * config.weights.step**2 // dim
    # xᵀ d a and hᵀ dy share a compilation unless exactly one width is a multiple of 16.
    for left, right in [(dim, hidden_dim), (hidden_dim, dim)][: 1 + (dim % 16 == 0) ^ (hidden_dim % 16 == 0)]:
        sizes = {"left_dim": left, "right_dim": right}
        name = case.name if left == dim else f"{case.name} transposed"
        variants.append(
            _variant(case, triton_wide_kernels.outer_kernel, name, {}, config.weights, sizes, pairs, 2 * dim)
        )
    for backward in (False, True) if dim > WIDEST_FORWARD else (True,):
        constants: dict[str, Any] = {"INNER": WIDE_INNER, "BACKWARD": backward, "PAIR": backward}
        if not backward:
            constants |= {"p_grad": None, "p_da": None, "p_db": None}
        # A launch turns a stride of 1 into a constant.
        constants["inner_stride" if backward else "out_stride"] = 1
        sizes = {"hidden_dim": hidden_dim, "inner_dim": hidden_dim, "out_dim": dim}
        sizes |= {"out_stride": hidden_dim} if backward else {"inner_stride": dim}
        kernels = (
            (triton_wide_kernels.hidden_kernel, config.rows if backward else config.forward, 6 if backward else 4),
            (triton_wide_kernels.product_kernel, config.product, 4 if backward else 2),
        )
        for kernel, tiles, flops in kernels:
            pairs = tiles.block * tiles.step * WIDE_INNER // dim
            name = f"{case.name} {'backward' if backward else 'forward'}"
            variants.append(_variant(case, kernel, name, constants, tiles, sizes, pairs, flops * dim))
    return variants


def _variant(
    case: _Case, kernel: Any, name: str, constants: dict[str, Any], tiles: Tiles, sizes: dict[str, int],
    pairs: int = 0, flops_per_pair: int = 0,
) -> Variant:  # fmt: skip
    """``sizes``: the integer arguments that Triton specialises by divisibility by 16."""
    values = constants | {
        "D": case.dim,
        "EXPERTS": triton.next_power_of_2(case.num_experts),
        "BLOCK": tiles.block,
        "STEP": tiles.step,
        "PRECISION": case.precision,
    }
    used = {argument: value for argument, value in values.items() if argument in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        if argument in used:
            continue
        if argument in ("p_offsets", "p_order"):
            types[argument] = "*i64"
        elif argument in FLOAT32 or (argument.startswith("p_dw") and kernel in NARROW):
            types[argument] = "*fp32"
        else:
            types[argument] = f"*{case.dtype}" if argument.startswith("p_") else "i32"
    multiples = tuple(argument for argument, size in sizes.items() if argument in types and size % 16 == 0)
    return Variant(
        kernel, name, types, used, tiles.num_warps, tiles.num_stages, multiples,
        pairs=pairs, flops_per_pair=flops_per_pair, archs=(case.arch,),
    )  # fmt: skip
