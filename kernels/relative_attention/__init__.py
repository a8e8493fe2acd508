"""FuXi's relative attention, causal and jagged: a positional, a temporal and a semantic channel.

`reference.py` is the definition. `api.py` is the public function, which checks its arguments and chooses the backend. `plan.py`,
`torch_form.py` and `torch_op.py` are the PyTorch form. `work_plan.py`, `time_tables.py` and the modules `triton_*` are the
Triton form, and `variants.py` lists its compilations in use. docs/kernels.md derives the cost and the tiles.
"""

from __future__ import annotations

from kernels.relative_attention.api import plan_attention, relative_attention

__all__ = ["plan_attention", "relative_attention"]
