"""RMS normalisation with an optional gate and dropout: the definition and its checks (`api`), PyTorch and Triton forms."""

from __future__ import annotations

from kernels.gated_rms_norm.api import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
