"""Checks that forms of a computation agree, so that only right forms are measured."""

from __future__ import annotations

from torch import Tensor


def check_same(what: str, found: Tensor, reference: Tensor, tolerance: float) -> None:
    """Raises if the relative error (the quotient of Euclidean norms) is above ``tolerance`` or not a number."""
    error = ((found.double() - reference.double()).norm() / reference.double().norm()).item()
    if not error <= tolerance:
        raise RuntimeError(f"{what} differs from its reference by {error:.2e}, more than {tolerance:.0e}")
