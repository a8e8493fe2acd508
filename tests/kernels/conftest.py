"""What the tests of several kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["highest", "high"], ids=["exact products", "TF32 products"])
def products(request: pytest.FixtureRequest) -> Iterator[float]:
    """float32 products as torch is told to make them, each with tiles of its own; yields the error that they may bring.

    Triton's interpreter multiplies exactly either way.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield 2e-3 if request.param == "high" and torch.cuda.is_available() else 0.0
    torch.set_float32_matmul_precision(before)
