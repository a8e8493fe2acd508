"""Chooses the implementation of an operation, Triton or PyTorch, and registers custom operators.

`auto` takes Triton on CUDA and PyTorch elsewhere. A backend that is named explicitly runs or raises; it never falls back.
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
    """``torch`` or ``triton`` for an operation whose argument ``name`` is ``tensor``; only PyTorch takes float64.

    Raises:
        ValueError: see `resolve_backend`; or ``requested`` is ``triton``, which does not take the dtype.
    """
    if requested == "auto" and tensor.dtype not in TRITON_DTYPES:
        return "torch"
    chosen = resolve_backend(requested, tensor.device)
    if chosen == "triton" and tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; the triton backend takes float32, bfloat16 and float16")
    return chosen


def resolve_backend(requested: str, device: torch.device) -> str:
    """``torch`` or ``triton`` for an operation on ``device``.

    Raises:
        ValueError: ``requested`` is not auto, torch or triton, or triton cannot run on ``device``: it needs CUDA or the
            interpreter (TRITON_INTERPRET=1 in the environment).
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
    """Whether Triton kernels run in Triton's interpreter, which takes tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """`torch.library.custom_op` for a function that changes none of its tensors and runs on the device of the first.

    Triton launches on the current device, wherever the tensors are, and a custom operator does not set that device.
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
    """The precision of `tl.dot`. torch.set_float32_matmul_precision decides it for float32: all but "highest" allow TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> int:
    """The compute capability of a GPU, such as 80 or 90; for Triton's interpreter on a CPU, that of an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the layout that the kernels read."""
    return [tensor.contiguous() for tensor in tensors]
