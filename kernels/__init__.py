"""The FuXi block's arithmetic: each operation with a PyTorch form and Triton kernels behind one function."""

from __future__ import annotations

from kernels.expert_ffn import expert_ffn, routed_expert_ffn
from kernels.gated_rms_norm import gated_rms_norm, rms_norm
from kernels.relative_attention import plan_attention, relative_attention
from kernels.sampled_softmax import sampled_softmax_loss
from kernels.silu_split import silu_split

__all__ = [
    "expert_ffn",
    "gated_rms_norm",
    "plan_attention",
    "relative_attention",
    "rms_norm",
    "routed_expert_ffn",
    "sampled_softmax_loss",
    "silu_split",
]
