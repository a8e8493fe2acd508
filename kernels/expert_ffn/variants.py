"""The compilations of the expert FFN that are in use: the widths and dtypes of the configurations in `configs/` and of the
benchmark."""

from __future__ import annotations

from typing import Any

from kernels.expert_ffn import triton_kernels, triton_wide_kernels
from kernels.expert_ffn.triton_form import SUM_BLOCK, WIDE_INNER, WIDEST_BACKWARD, WIDEST_FORWARD, LaunchConfig, Tiles
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
SIZES = ("hidden_dim", "inner_dim", "out_dim", "inner_stride", "out_stride", "left_dim", "right_dim")
NARROW = (triton_kernels.forward_kernel, triton_kernels.backward_rows_kernel, triton_kernels.backward_weights_kernel)


def aot_variants() -> list[Variant]:
    """Every kernel for every width that it serves."""
    variants = []
    for dtype, itemsize, precision, dims in SHAPES:
        for dim in dims:
            config = LaunchConfig.choose(dim, itemsize, precision)
            name = f"{dtype}{' exact' if dtype == 'fp32' and precision == 'ieee' else ''} d={dim}"
            constants = {"D": dim, "PRECISION": precision}
            if dim <= WIDEST_FORWARD:
                variants += _narrow_variants(name, dtype, constants, config, backward=dim <= WIDEST_BACKWARD)
            if dim > WIDEST_BACKWARD:
                variants += _wide_variants(name, dtype, constants, config, forward=dim > WIDEST_FORWARD)
    for dtype in ("bf16", "fp32"):
        variants.append(_variant(triton_kernels.sum_chunks_kernel, dtype, dtype, {}, Tiles(SUM_BLOCK, 0, 4, 1)))
    return variants


def _narrow_variants(
    name: str, dtype: str, constants: dict[str, Any], config: LaunchConfig, backward: bool
) -> list[Variant]:
    passes = list(zip(NARROW, (config.forward, config.rows, config.weights), strict=True))
    return [
        _variant(kernel, f"{name} top_k={top_k}", dtype, constants | {"TOP_K": top_k}, tiles)
        for top_k in ((0, 2) if backward else (0,))
        for kernel, tiles in passes[: 3 if backward else 1]
    ]


def _wide_variants(
    name: str, dtype: str, constants: dict[str, Any], config: LaunchConfig, forward: bool
) -> list[Variant]:
    variants = [_variant(triton_wide_kernels.outer_kernel, name, dtype, constants, config.weights)]
    constants = constants | {"INNER": WIDE_INNER}
    for backward in (False, True) if forward else (True,):
        passes = f"{name} {'backward' if backward else 'forward'}"
        # A launch makes a stride of 1 a constant.
        options = constants | {"BACKWARD": backward, "PAIR": backward, "inner_stride" if backward else "out_stride": 1}
        tiles = config.rows if backward else config.forward
        variants.append(_variant(triton_wide_kernels.hidden_kernel, passes, dtype, options, tiles))
        variants.append(_variant(triton_wide_kernels.product_kernel, passes, dtype, options, config.product))
    return variants


def _variant(kernel: Any, name: str, dtype: str, constants: dict[str, Any], tiles: Tiles) -> Variant:
    values = constants | {"EXPERTS": NUM_EXPERTS, "BLOCK": tiles.block, "STEP": tiles.step}
    if not values.get("TOP_K"):
        values |= {"p_order": None, "p_choice_weights": None, "p_d_choice": None}
    types = {}
    for argument in kernel.arg_names:
        if argument in values:
            continue
        if argument in ("p_offsets", "p_order"):
            types[argument] = "*i64"
        elif argument in FLOAT32 or (argument.startswith("p_dw") and kernel in NARROW):
            types[argument] = "*fp32"
        else:
            types[argument] = f"*{dtype}" if argument.startswith("p_") else "i32"
    used = {argument: value for argument, value in values.items() if argument in kernel.arg_names}
    sizes = () if values.get("D", 0) % 16 else SIZES
    return Variant(kernel, name, types, used, tiles.num_warps, tiles.num_stages, sizes)
