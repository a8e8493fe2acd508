"""Experts that get far less or far more than an even share of the tokens."""

from __future__ import annotations

STARVED_SHARE = 0.1
GREEDY_SHARE = 0.9


def starved_experts(load: list[list[list[float]]]) -> list[tuple[int, int, float]]:
    """(index into ``load``, expert, share) of experts to which all views together send less than STARVED_SHARE of an even share."""
    return [found for found in _mean_shares(load) if found[2] < STARVED_SHARE / len(load[0][0])]


def greedy_experts(load: list[list[list[float]]], top_k: int) -> list[tuple[int, int, float]]:
    """Like `starved_experts`, for experts that get more than GREEDY_SHARE of their maximum, unless every expert must."""
    return [found for found in _mean_shares(load) if found[2] > GREEDY_SHARE / top_k and len(load[0][0]) > top_k]


def _mean_shares(load: list[list[list[float]]]) -> list[tuple[int, int, float]]:
    return [
        (block, expert, sum(shares) / len(shares))
        for block, views in enumerate(load)
        for expert, shares in enumerate(zip(*views, strict=True))
    ]
