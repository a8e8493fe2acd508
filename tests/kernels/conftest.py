"""Fixtures that the tests of several kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import interpreting


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that values which a kernel reads or returns without having written them show."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def interpreted_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Triton's interpreter multiply bfloat16 as numbers; that of 3.6 and 3.7 would multiply the bit patterns."""
    if not interpreting():
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar != bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), float32)

    multiply = InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(builder, numbers(a), numbers(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=["highest", "high"], ids=["exact products", "TF32 products"])
def products(request: pytest.FixtureRequest) -> Iterator[float]:
    """Runs a test with each of torch's precisions of float32 products, which have different tiles; yields the allowed error.

    Triton's interpreter multiplies exactly with both.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield 2e-3 if request.param == "high" and torch.cuda.is_available() else 0.0
    torch.set_float32_matmul_precision(before)
