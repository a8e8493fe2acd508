"""HR, NDCG and MRR of the rank that a model gives to each user's one target."""

from __future__ import annotations

import torch
from torch import Tensor

CUTOFFS = (10, 50)


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """Averages over users.

    Args:
        ranks: (users,) int64, 1 for a target ranked first.

    Returns:
        hr@k the share of targets in the first k; ndcg@k the mean of 1 / log2(rank + 1) over those in the first k and 0
        elsewhere, which is NDCG for a single relevant item; mrr the mean of 1 / rank. NaN without users.
    """
    ranks = ranks.double()
    metrics = {}
    for cutoff in CUTOFFS:
        hit = ranks <= cutoff
        metrics[f"hr@{cutoff}"] = hit.double().mean().item()
        metrics[f"ndcg@{cutoff}"] = torch.where(hit, 1 / torch.log2(ranks + 1), 0.0).mean().item()
    return metrics | {"mrr": (1 / ranks).mean().item()}
