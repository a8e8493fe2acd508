"""Counts the calls that make the host wait for a GPU, on any device: by name and by the line of this project that makes them."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
# Reads a value of a tensor, or makes a tensor whose size depends on one.
WAITING = {
    Tensor.item: "item",
    Tensor.tolist: "tolist",
    Tensor.__int__: "int",
    Tensor.__float__: "float",
    Tensor.__bool__: "bool",
    Tensor.__index__: "index",
    Tensor.cpu: "cpu",
    Tensor.numpy: "numpy",
    Tensor.nonzero: "nonzero",
    torch.nonzero: "nonzero",
    torch.unique: "unique",
    Tensor.unique: "unique",
    torch.bincount: "bincount",
    Tensor.bincount: "bincount",
    torch.masked_select: "masked_select",
    Tensor.masked_select: "masked_select",
    torch.equal: "equal",
    # Copies of host memory that is not pinned.
    torch.tensor: "tensor",
    Tensor.new_tensor: "new_tensor",
}


class Synchronisations(TorchFunctionMode):
    """``found``: how often each (file, function, call) waited while the mode was active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, str, str]] = collections.Counter()

    def __torch_function__(
        self, call: Callable[..., Any], kinds: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        name = WAITING.get(call)
        if call is Tensor.__getitem__ and _has_mask(arguments[1]):
            name = "mask"
        if call in (torch.repeat_interleave, Tensor.repeat_interleave):
            counts = arguments[1] if len(arguments) > 1 else named.get("repeats", arguments[0])
            name = "repeat_interleave" if isinstance(counts, Tensor) and named.get("output_size") is None else None
        if name:
            self.found[(*caller(), name)] += 1
        return call(*arguments, **named)


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def caller() -> tuple[str, str]:
    """File and function of the innermost frame of this project, outside the tests."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "mme") or path.is_relative_to(ROOT / "kernels"):
            return str(path.relative_to(ROOT)), frame.f_code.co_name
        frame = frame.f_back
    return "", ""
