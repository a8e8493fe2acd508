"""Mixture of gated experts: router, experts, and the interface through which tokens may move to other ranks.

p = softmax(z W_g) in float32; the k largest are kept and optionally renormalised to sum 1; y = Σ_k p_k · Expert_k(z). A
router sees one view of a token, W_g (d, E), or optionally all views, W_g (M·d, M·E); it decides for each view separately.
Load-balance loss of the Switch Transformer (arXiv 2101.03961) and GShard (arXiv 2006.16668); router z-loss of ST-MoE
(arXiv 2202.08906).

The layer knows no process group: a dispatcher takes rows to their experts and back. If all experts are local, none is
needed; `mme.distributed.experts` has the dispatcher across ranks.

Legend: R rows (tokens of all views), M views, d view width, E experts, k top_k, f hidden width of an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import expert_ffn, routed_expert_ffn
from kernels.expert_ffn.routing import sorted_copies, weighted_choices
from mme.profiling.regions import region


@dataclass(frozen=True)
class Routing:
    """The decisions of a router for the rows of one batch.

    Attributes:
        probabilities: (R, E) float32, softmax of the router's logits.
        logits: (R, E) float32.
        experts: (R, k) int64, the chosen experts.
        weights: (R, k) float32, their weights.
        counts: (M, E) int64, number of choices of each expert in each view.
        dropped: (M, E) int64, number of choices that exceeded the capacity; None: the capacity is unlimited.
    """

    probabilities: Tensor
    logits: Tensor
    experts: Tensor
    weights: Tensor
    counts: Tensor
    dropped: Tensor | None = None

    @classmethod
    def of_parts(cls, parts: list[Routing]) -> Routing:
        """Combines the decisions for the parts of a batch."""
        if len(parts) == 1:
            return parts[0]
        num_views = parts[0].counts.shape[0]

        def by_view(name: str) -> Tensor:
            values = [getattr(part, name).unflatten(0, (num_views, -1)) for part in parts]
            return torch.cat(values, dim=1).flatten(0, 1)

        rows = {name: by_view(name) for name in ("probabilities", "logits", "experts", "weights")}
        dropped = [part.dropped for part in parts if part.dropped is not None]
        return cls(
            **rows,
            counts=torch.stack([part.counts for part in parts]).sum(0),
            dropped=torch.stack(dropped).sum(0) if dropped else None,
        )


class Dispatcher(Protocol):
    """Sends rows sorted by expert to the ranks that own the experts, and returns the results."""

    num_local_experts: int

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Sends rows (R·k, d), sorted by expert with counts (E,), to their owners.

        Returns the received rows sorted by local expert, their expert_offsets (num_local_experts + 1,) int64, and the state
        that `combine` needs.
        """
        ...

    def combine(self, rows: Tensor, state: Any) -> Tensor:
        """Results in the order of `dispatch`'s output → (R·k, d) in the order of its input."""
        ...


class GatedExperts(nn.Module):
    """num_experts gated FFNs of the same shape, y = (SiLU(x W_1) ⊙ (x W_3)) W_2; with one expert, the dense FFN."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        for weight in self.parameters():
            for expert in weight:
                nn.init.xavier_uniform_(expert)

    @region("experts")
    def forward(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """(R, d) sorted by expert → (R, d); row r belongs to expert e where expert_offsets[e] ≤ r < [e + 1]."""
        weights = self._weights(rows.dtype)
        return expert_ffn(rows, expert_offsets, *weights, backend=self.backend, check_offsets=False)

    @region("experts")
    def mixture(self, z: Tensor, order: Tensor, choice_weights: Tensor, expert_offsets: Tensor) -> Tensor:
        """(R, d) → the weighted sums of its rows' choices, see `kernels.routed_expert_ffn`."""
        weights = self._weights(z.dtype)
        return routed_expert_ffn(
            z, order, choice_weights, expert_offsets, *weights, backend=self.backend, check_offsets=False
        )

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1.to(dtype), self.w3.to(dtype), self.w2.to(dtype)


class DenseFFN(nn.Module):
    """One gated FFN for all rows."""

    def __init__(self, dim: int, hidden_dim: int, backend: str = "auto") -> None:
        super().__init__()
        self.experts = GatedExperts(1, dim, hidden_dim, backend)

    def forward(self, z: Tensor, num_views: int) -> tuple[Tensor, Routing | None]:
        return self.experts(z, z.shape[0] * torch.arange(2, device=z.device)), None


class MixtureOfExperts(nn.Module):
    """Sends every row to its k best experts.

    No choice is dropped unless ``capacity_factor`` c > 0 limits every expert to ⌈c · R·k / E⌉ of a rank's R·k choices
    (GShard, arXiv 2006.16668). First choices have priority over second ones, then earlier rows over later ones; a dropped
    choice adds nothing to its row.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        dim: int,
        hidden_dim: int,
        renormalize: bool,
        backend: str = "auto",
        capacity_factor: float = 0.0,
        views_seen: int = 1,
    ) -> None:
        """``views_seen``: 1 to route each row by itself, M to route it by all views of its token."""
        super().__init__()
        self.num_experts = num_experts
        self.views_seen = views_seen
        self.top_k = top_k
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.router = nn.Linear(views_seen * dim, views_seen * num_experts, bias=False)
        self.experts = GatedExperts(num_experts, dim, hidden_dim, backend)
        self.dispatcher: Dispatcher | None = None

    @region("routing")
    def forward(self, z: Tensor, num_views: int) -> tuple[Tensor, Routing]:
        """z (R, d), view-major → (R, d) and the routing."""
        routing = self.route(z, num_views)
        if self.capacity_factor:
            return self._within_capacity(z, routing)
        order = torch.argsort(routing.experts.flatten(), stable=True)
        counts = routing.counts.sum(0)
        if self._all_local():
            return self.experts.mixture(z, order, routing.weights, offsets_of(counts)), routing
        results = self._results(sorted_copies(z, order, self.top_k), counts)
        return weighted_choices(results, order, routing.weights), routing

    def _all_local(self) -> bool:
        return self.dispatcher is None or self.dispatcher.num_local_experts == self.num_experts

    def _results(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The experts' results for rows (S, d) sorted by expert with counts (E,)."""
        if self.dispatcher is None or self._all_local():
            return self.experts(rows, offsets_of(counts))
        local_rows, expert_offsets, state = self.dispatcher.dispatch(rows, counts)
        return self.dispatcher.combine(self.experts(local_rows, expert_offsets), state)

    def _within_capacity(self, z: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        kept = _first_in_each_bin(
            routing.experts.T.flatten(), self.num_experts, self._capacity(routing.experts.numel())
        )
        kept = kept.view(self.top_k, -1).T
        expert = torch.where(kept, routing.experts, self.num_experts).flatten()  # dropped choices sort last
        order = torch.argsort(expert, stable=True)
        counts = count_bins(expert, self.num_experts + 1)[: self.num_experts]
        num_kept = int(counts.sum())
        results = self._results(sorted_copies(z, order[:num_kept], self.top_k), counts)
        results = F.pad(results, (0, 0, 0, order.numel() - num_kept))
        dropped = self._by_view(routing.experts, routing.counts.shape[0], ~kept)
        return weighted_choices(results, order, routing.weights), replace(routing, dropped=dropped)

    def _capacity(self, num_choices: int) -> int:
        return math.ceil(self.capacity_factor * num_choices / self.num_experts)

    def _by_view(self, experts: Tensor, num_views: int, chosen: Tensor | None = None) -> Tensor:
        """(M, E) number of choices of each expert in each view, counting those marked ``chosen``."""
        view = torch.arange(num_views, device=experts.device).repeat_interleave(experts.numel() // num_views)
        bins = view * self.num_experts + experts.flatten()
        return count_bins(bins, num_views * self.num_experts, chosen).view(num_views, self.num_experts)

    def route(self, z: Tensor, num_views: int) -> Routing:
        seen = z.to(self.router.weight.dtype).unflatten(0, (self.views_seen, -1)).transpose(0, 1).flatten(1)
        logits = self.router(seen).float().unflatten(1, (self.views_seen, -1)).transpose(0, 1).flatten(0, 1)
        probabilities = torch.softmax(logits, dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(probabilities, logits, experts, weights, self._by_view(experts, num_views))


def count_bins(bins: Tensor, num_bins: int, chosen: Tensor | None = None) -> Tensor:
    """bins (n,) → (num_bins,) int64: entries of each bin, of those marked ``chosen``. `torch.bincount` reads the largest bin
    on the host."""
    ones = torch.ones_like(bins) if chosen is None else chosen.flatten().to(bins.dtype)
    return bins.new_zeros(num_bins).scatter_add_(0, bins, ones)


def _first_in_each_bin(bins: Tensor, num_bins: int, limit: int) -> Tensor:
    """bins (n,) → (n,) bool, whether an entry is among the first ``limit`` of its bin."""
    order = torch.argsort(bins, stable=True)
    starts = offsets_of(count_bins(bins, num_bins))
    place = torch.arange(bins.numel(), device=bins.device) - starts[bins[order]]
    return torch.empty_like(bins, dtype=torch.bool).scatter_(0, order, place < limit)


def load_balance_loss(routing: Routing, global_counts: Tensor, global_rows: Tensor) -> Tensor:
    """This rank's share of E · Σ_e f_e P_e; the shares of all ranks add up to the loss of the global batch.

    f_e is the share of all choices that expert e received, and P_e its mean probability over the rows of all ranks.

    Args:
        routing: the routing of this rank's rows.
        global_counts: (E,) number of choices that each expert received over all ranks.
        global_rows: () number of rows over all ranks.
    """
    share = global_counts / global_counts.sum().clamp(min=1)
    mean_probability = routing.probabilities.sum(0) / global_rows.clamp(min=1)
    return global_counts.numel() * (share * mean_probability).sum()


def router_z_loss(routing: Routing, global_rows: Tensor) -> Tensor:
    """This rank's share of the mean over all rows of log²Σ_e exp(logit_e)."""
    return torch.logsumexp(routing.logits, dim=-1).square().sum() / global_rows.clamp(min=1)


def offsets_of(counts: Tensor) -> Tensor:
    """counts [2, 0, 3] → offsets [0, 2, 2, 5], int64."""
    return F.pad(counts.cumsum(0), (1, 0))
