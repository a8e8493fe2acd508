"""Scores from hidden states and item rows.

The score of item i is Σ_m ⟨h_m, E_m[i]⟩ after the normalisation of both sides that `model.score_norm` names. It is always a
dot product of D-wide vectors, so ranking and losses need no case distinction.

Legend: M views, d view width, D = M·d.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def normalize_views(x: Tensor, score_norm: str) -> Tensor:
    """The vectors whose dot products are scores.

    Args:
        x: (..., M, d) the views of hidden states or of items.
        score_norm: "concat", the D-wide concatenation has length 1; "per_view", each view has length 1/√M, so that
            the dot product is the mean of the M cosines; "none", no normalisation.

    Returns:
        (..., D)
    """
    if score_norm == "none":
        return x.flatten(-2)
    if score_norm == "concat":
        return F.normalize(x.flatten(-2), dim=-1, eps=EPS)
    return (F.normalize(x, dim=-1, eps=EPS) / x.shape[-2] ** 0.5).flatten(-2)
