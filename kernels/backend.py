"""Which implementation of an operation runs, the Triton kernels or their PyTorch twin; and how torch knows them.

`auto` takes Triton on CUDA and PyTorch elsewhere. A backend asked for by name runs or raises: it never falls back.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

BACKENDS = ("auto", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend_for(requested: str, name: str, tensor: Tensor) -> str:
    """``torch`` or ``triton``, for an operation on ``tensor``, its argument ``name``; float64 has the PyTorch form alone.

    Raises:
        ValueError: as `resolve_backend`, or triton is asked for by name and does not take the dtype.
    """
    if requested == "auto" and tensor.dtype not in TRITON_DTYPES:
        return "torch"
    chosen = resolve_backend(requested, tensor.device)
    if chosen == "triton" and tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; the triton backend takes float32, bfloat16 and float16")
    return chosen


def resolve_backend(requested: str, device: torch.device) -> str:
    """``torch`` or ``triton``, on ``device``.

    Raises:
        ValueError: ``requested`` is none of auto, torch and triton, or triton cannot run on ``device``: it needs CUDA,
            or the interpreter (TRITON_INTERPRET=1 in the environment).
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend ({requested!r}) must be one of {', '.join(BACKENDS)}")
    if requested == "auto":
        return "triton" if device.type == "cuda" and triton_installed() else "torch"
    if requested == "triton":
        if not triton_installed():
            raise ValueError("backend ('triton') needs the triton package, which is not installed")
        if device.type != "cuda" and not interpreting():
            raise ValueError(
                f"backend ('triton') on device {device.type} needs TRITON_INTERPRET=1; on CUDA it needs nothing"
            )
    return requested


@torch.compiler.assume_constant_result
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`torch.library.custom_op` for a function of tensors that changes none of them; it runs on its first tensor's device.

    Triton launches on the current device, whatever the device of the tensors, and a custom operator does not set it.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *others: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *others)

        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(name, on_its_device, mutates_args=(), schema=schema)

    return register


@torch.compiler.assume_constant_result
def dot_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s. float32 products follow torch.set_float32_matmul_precision: "highest" is exact, the others allow TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> int:
    """Of a GPU, such as 80 or 90; in Triton's interpreter, on a CPU, that of an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def contiguous(*tensors: Tensor) -> list[Tensor]:
    """As the kernels read them."""
    return [tensor.contiguous() for tensor in tensors]
