"""The FuXi block's arithmetic: each operation with a PyTorch form and Triton kernels behind one function."""

from __future__ import annotations

from kernels.relative_attention import plan_attention, relative_attention

__all__ = ["plan_attention", "relative_attention"]
