"""HR, NDCG and MRR of the rank that a model gives to each user's single target."""

from __future__ import annotations

import torch
from torch import Tensor

from mme.evaluation.record import CUTOFFS
from mme.evaluation.user_ranks import UNRANKED


def user_metrics(ranks: Tensor) -> dict[str, Tensor]:
    """Each metric of each user, (users,) float64.

    hr@k is 1 if the target is among the first k, otherwise 0. ndcg@k is 1 / log2(rank + 1) if the target is among the first k,
    otherwise 0, which is NDCG for a single relevant item. mrr is 1 / rank.

    Args:
        ranks: (users,) int64, starting at 1; `UNRANKED` for a target in no list, which counts as 0 in every metric.
    """
    ranked = ranks != UNRANKED
    ranks = ranks.double()
    metrics = {}
    for cutoff in CUTOFFS:
        hit = ranks <= cutoff
        metrics[f"hr@{cutoff}"] = hit.double()
        metrics[f"ndcg@{cutoff}"] = torch.where(hit, 1 / torch.log2(ranks + 1), 0.0)
    return metrics | {"mrr": torch.where(ranked, 1 / ranks, 0.0)}


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """Means of `user_metrics` over users; NaN without users."""
    return {name: values.mean().item() for name, values in user_metrics(ranks).items()}


def standard_errors(ranks: Tensor) -> dict[str, float]:
    """Standard errors of `rank_metrics`, s / √n with the sample's standard deviation s; 0 for fewer than two users."""
    if ranks.numel() < 2:
        return dict.fromkeys(rank_metrics(ranks), 0.0)
    return {name: values.std().item() / ranks.numel() ** 0.5 for name, values in user_metrics(ranks).items()}
