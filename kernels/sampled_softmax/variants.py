"""The compilations of sampled softmax for the widths and dtypes of the configurations in `configs/` and of the benchmark."""

from __future__ import annotations

from typing import Any

from kernels.sampled_softmax import triton_kernels
from kernels.sampled_softmax.triton_form import PIECE, SMALLEST_SHARED_GROUP, LaunchConfig
from kernels.variant import Variant

OWN_KERNELS = (
    triton_kernels.forward_own_kernel,
    triton_kernels.backward_hidden_own_kernel,
    triton_kernels.backward_items_kernel,
    triton_kernels.sum_rows_kernel,
)
SHARED_KERNELS = (
    triton_kernels.forward_shared_kernel,
    triton_kernels.backward_hidden_shared_kernel,
    triton_kernels.backward_negatives_kernel,
)
WIDTHS = (50, 64, 128, 256, 512)  # FuXi-α's is 50
BFLOAT16 = ("bf16", 2, "ieee")  # dtype, bytes, precision of products
TF32 = ("fp32", 4, "tf32")
FLOAT32 = ("fp32", 4, "ieee")
OF_DTYPE = ("p_hidden", "p_items", "p_d_hidden")
INT64 = ("p_targets", "p_negatives")
INT32 = ("p_order", "p_starts", "p_pieces", "p_piece_starts")


def aot_variants() -> list[Variant]:
    """Every kernel for every width and dtype, with the tiles of groups of 64 tokens, the default, and of 16.

    The variants with a bias per item, as for the log-Q correction, are those of bfloat16.
    """
    variants = [
        _variant(kernel, *dtype, width, 1)
        for dtype in (BFLOAT16, FLOAT32)
        for width in WIDTHS
        for kernel in OWN_KERNELS
    ]
    groups = [(dtype, width, 64) for dtype in (BFLOAT16, TF32, FLOAT32) for width in WIDTHS] + [(BFLOAT16, 64, 16)]
    variants += [_variant(kernel, *dtype, width, size) for dtype, width, size in groups for kernel in SHARED_KERNELS]
    return variants + [
        _variant(kernel, *BFLOAT16, width, size, bias=True)
        for width in WIDTHS
        for kernels, size in ((OWN_KERNELS, 1), (SHARED_KERNELS, 64))
        for kernel in kernels
        if "p_bias" in kernel.arg_names
    ]


def shape_variants(dtype: str, itemsize: int, precision: str, width: int, group_size: int, bias: bool) -> list[Variant]:
    """The variants that forward and backward launch for one shape, on every GPU."""
    own = group_size < SMALLEST_SHARED_GROUP
    kernels = OWN_KERNELS if own else (*SHARED_KERNELS, *OWN_KERNELS[2:])
    return [_variant(kernel, dtype, itemsize, precision, width, group_size, bias) for kernel in kernels]


def _variant(
    kernel: Any, dtype: str, itemsize: int, precision: str, width: int, group_size: int, bias: bool = False
) -> Variant:
    config = LaunchConfig.choose(width, itemsize, precision, group_size)
    label = f"sampled softmax {dtype} D={width}"
    if kernel in OWN_KERNELS:
        options = config.own()
    else:
        label += f" {precision} g={group_size}"
        holds_negatives = kernel is triton_kernels.backward_negatives_kernel
        options = config.shared_negatives() if holds_negatives else config.shared()
    label += " bias" if bias else ""
    values = options | {"D": width, "PIECE": PIECE} | ({} if bias else {"p_bias": None})
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in values:
            constants[name] = values[name]
        elif name in OF_DTYPE:
            types[name] = f"*{dtype}"
        elif name in INT64:
            types[name] = "*i64"
        elif name in INT32:
            types[name] = "*i32"
        elif name in ("scale", "offset"):
            types[name] = "fp32"
        else:
            types[name] = "*fp32" if name.startswith("p_") else "i32"
    shared = kernel in SHARED_KERNELS
    return Variant(
        kernel,
        label,
        types,
        constants,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        pairs=options["BLOCK"] * options["STEP"] if shared else 0,
        flops_per_pair=(2 if kernel is triton_kernels.forward_shared_kernel else 4) * width,
    )
