"""FuXi's relative attention: positional, temporal and semantic channel, causal, jagged, in one pass.

`reference.py` is the definition, `plan.py` what depends on offsets and timestamps alone, `tiled.py` the PyTorch form,
`api.py` the public function.
"""

from __future__ import annotations

from kernels.relative_attention.api import plan_attention, relative_attention

__all__ = ["plan_attention", "relative_attention"]
