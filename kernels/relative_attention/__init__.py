"""FuXi's relative attention: positional, temporal and semantic channel, causal, jagged, in one pass over the keys.

`reference.py` is the definition; `api.py` the public function, its checks and the choice of the backend; `plan.py`,
`torch_form.py` and `torch_op.py` the PyTorch form; `triton_kernels.py` and `triton_form.py` the Triton form, `variants.py` its
compilations in use. docs/kernels.md derives its cost and its tiles.
"""

from __future__ import annotations

from kernels.relative_attention.api import plan_attention, relative_attention

__all__ = ["plan_attention", "relative_attention"]
