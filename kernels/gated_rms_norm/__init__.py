"""RMS normalisation with an optional gate and dropout: `api` has the definition and the checks, the others both forms."""

from __future__ import annotations

from kernels.gated_rms_norm.api import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
