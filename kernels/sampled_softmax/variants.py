"""The compilations of sampled softmax that are in use: the widths and dtypes of the configurations in `configs/` and of
the benchmark."""

from __future__ import annotations

from typing import Any

import torch

from kernels.sampled_softmax import triton_kernels
from kernels.sampled_softmax.triton_op import PIECE, LaunchConfig
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
# (dtype, bytes, precision of products, D); FuXi-α's width is 50.
SHAPES = (
    ("bf16", 2, "ieee", 50),
    ("bf16", 2, "ieee", 64),
    ("bf16", 2, "ieee", 128),
    ("bf16", 2, "ieee", 256),
    ("bf16", 2, "ieee", 512),
    ("fp32", 4, "tf32", 50),
    ("fp32", 4, "tf32", 64),
    ("fp32", 4, "tf32", 256),
    ("fp32", 4, "tf32", 512),
)
OF_DTYPE = ("p_hidden", "p_items", "p_d_hidden")
INT64 = ("p_targets", "p_negatives")
INT32 = ("p_order", "p_starts", "p_pieces", "p_piece_starts")


def aot_variants() -> list[Variant]:
    """Every kernel for every shape."""
    return [_variant(kernel, *shape) for shape in SHAPES for kernel in (*OWN_KERNELS, *SHARED_KERNELS)]


def _variant(kernel: Any, dtype: str, itemsize: int, precision: str, width: int) -> Variant:
    config = LaunchConfig.choose(width, itemsize)
    options = config.own() if kernel in OWN_KERNELS else config.shared(torch.float32)
    values = options | {"D": width, "PIECE": PIECE, "PRECISION": precision}
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
    name = f"sampled softmax {dtype} D={width}"
    return Variant(kernel, name, types, constants, num_warps=options["num_warps"], num_stages=options["num_stages"])
