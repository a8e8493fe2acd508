"""SiLU of the projection, split into u, v, q and k by group."""

from __future__ import annotations

from kernels.silu_split.api import silu_split

__all__ = ["silu_split"]
