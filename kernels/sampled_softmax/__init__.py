"""Sampled softmax: the loss of each token over its target and its negatives, without the gathered negatives.

`api.py` has the definition, the public function, its checks and the choice of the backend; `torch_form.py` the PyTorch
form; `triton_kernels.py` and `triton_form.py` the Triton form, `variants.py` its compilations in use. docs/kernels.md
derives its cost and its tiles.
"""

from __future__ import annotations

from kernels.sampled_softmax.api import sampled_softmax_loss

__all__ = ["sampled_softmax_loss"]
