"""Without a GPU the Triton kernels of these tests run in Triton's interpreter."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Before the first import of a kernel: triton.jit looks here when it decorates.
    os.environ.setdefault("TRITON_INTERPRET", "1")
