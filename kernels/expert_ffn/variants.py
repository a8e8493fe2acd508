"""The compilations of the expert FFN that are in use: the widths and dtypes of the configurations in `configs/` and of the
benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels.expert_ffn import triton_kernels, triton_wide_kernels
from kernels.expert_ffn.triton_form import SUM_TILES, WIDE_INNER, WIDEST_BACKWARD, WIDEST_FORWARD, LaunchConfig, Tiles
from kernels.variant import Variant

NUM_EXPERTS = 8
# (dtype, bytes, precision of products, widths)
SHAPES = (
    ("bf16", 2, "ieee", (16, 32, 50, 64, 100, 128, 256, 512)),
    ("fp32", 4, "tf32", (16, 50, 64, 128, 256, 512)),
    ("fp32", 4, "ieee", (50, 64, 128, 256, 512)),
    ("fp16", 2, "ieee", (64, 512)),
)
FLOAT32 = ("p_partial", "p_choice_weights", "p_d_choice")
SIZES = ("hidden_dim", "size", "inner_dim", "out_dim", "inner_stride", "out_stride", "left_dim", "right_dim")
NARROW = (triton_kernels.forward_kernel, triton_kernels.backward_rows_kernel, triton_kernels.backward_weights_kernel)


@dataclass(frozen=True)
class _Case:
    """A width and dtype on one kind of GPU, with the tiles that are launched for them."""

    name: str
    dtype: str
    dim: int
    constants: dict[str, Any]
    config: LaunchConfig
    arch: int


def aot_variants() -> list[Variant]:
    """Every kernel for every width that it serves, with the tiles of each kind of GPU."""
    variants = []
    for arch in (80, 90):
        for dtype, itemsize, precision, dims in SHAPES:
            for dim in dims:
                name = f"{dtype}{' exact' if dtype == 'fp32' and precision == 'ieee' else ''} d={dim}"
                config = LaunchConfig.choose(dim, itemsize, precision, arch)
                case = _Case(name, dtype, dim, {"D": dim, "PRECISION": precision}, config, arch)
                variants += _narrow_variants(case) + _wide_variants(case)
        for dtype in ("bf16", "fp16", "fp32"):
            case = _Case(dtype, dtype, 0, {}, config, arch)
            variants.append(_variant(case, triton_kernels.sum_chunks_kernel, "", {}, SUM_TILES, 0, 0))
    return variants


def _narrow_variants(case: _Case) -> list[Variant]:
    tiles = (case.config.forward, case.config.rows, case.config.weights)
    products = (6, 10, 12)  # FLOPs a pair over d, see docs/kernels.md
    passes = list(zip(NARROW, tiles, products, strict=True))
    if case.dim > WIDEST_FORWARD:
        return []
    if case.dim > WIDEST_BACKWARD:
        passes = passes[:1]
    return [
        _variant(case, kernel, f" top_k={k}", {"TOP_K": k}, tile, tile.block * tile.step, flops * case.dim)
        for k in ((0, 2) if case.dim <= WIDEST_BACKWARD else (0,))
        for kernel, tile, flops in passes
    ]


def _wide_variants(case: _Case) -> list[Variant]:
    """A pass covers a part of the width: pairs are counted as parts of whole ones."""
    dim, config = case.dim, case.config
    if dim <= WIDEST_BACKWARD:
        return []
    outer = config.weights
    pairs = outer.block * outer.step**2 // dim
    variants = [_variant(case, triton_wide_kernels.outer_kernel, "", {}, outer, pairs, 2 * dim)]
    for backward in (False, True) if dim > WIDEST_FORWARD else (True,):
        name = " backward" if backward else " forward"
        # A launch makes a stride of 1 a constant.
        constants: dict[str, Any] = {"INNER": WIDE_INNER, "BACKWARD": backward, "PAIR": backward}
        if not backward:
            constants |= {"p_grad": None, "p_da": None, "p_db": None}
        constants["inner_stride" if backward else "out_stride"] = 1
        kernels = (
            (triton_wide_kernels.hidden_kernel, config.rows if backward else config.forward, 6 if backward else 4),
            (triton_wide_kernels.product_kernel, config.product, 4 if backward else 2),
        )
        for kernel, tiles, flops in kernels:
            pairs = tiles.block * tiles.step * WIDE_INNER // dim
            variants.append(_variant(case, kernel, name, constants, tiles, pairs, flops * dim))
    return variants


def _variant(
    case: _Case, kernel: Any, name: str, constants: dict[str, Any], tiles: Tiles, pairs: int, flops_per_pair: int
) -> Variant:
    values = case.constants | constants | {"EXPERTS": NUM_EXPERTS, "BLOCK": tiles.block, "STEP": tiles.step}
    if not values.get("TOP_K"):
        values |= {"p_order": None, "p_choice_weights": None}
    types = {}
    for argument in kernel.arg_names:
        if argument in values:
            continue
        if argument in ("p_offsets", "p_order"):
            types[argument] = "*i64"
        elif argument in FLOAT32 or (argument.startswith("p_dw") and kernel in NARROW):
            types[argument] = "*fp32"
        else:
            types[argument] = f"*{case.dtype}" if argument.startswith("p_") else "i32"
    used = {argument: value for argument, value in values.items() if argument in kernel.arg_names}
    sizes = () if case.dim % 16 else SIZES
    return Variant(
        kernel, case.name + name, types, used, tiles.num_warps, tiles.num_stages, sizes,
        pairs=pairs, flops_per_pair=flops_per_pair, archs=(case.arch,),
    )  # fmt: skip
