"""The gated expert FFN: `api` has the definition and the checks, the other modules the PyTorch and Triton forms."""

from __future__ import annotations

from kernels.expert_ffn.api import expert_ffn, routed_expert_ffn

__all__ = ["expert_ffn", "routed_expert_ffn"]
