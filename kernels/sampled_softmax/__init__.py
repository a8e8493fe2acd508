"""Sampled softmax: the loss of each token over its target and its negatives, without storing the gathered negatives.

`api.py` has the definition and the public function, which checks its arguments and chooses the backend. `torch_form.py` is the
PyTorch form. `triton_kernels.py` and `triton_form.py` are the Triton form, and `variants.py` lists its compilations in use.
docs/kernels.md derives the cost and the tiles.
"""

from __future__ import annotations

from kernels.sampled_softmax.api import sampled_softmax_loss

__all__ = ["sampled_softmax_loss"]
