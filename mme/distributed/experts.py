"""Expert parallelism with DeepSpeed-MoE's groups and all-to-all, without dropping tokens.

Rank r of an expert-parallel group of P ranks owns the experts [r·E/P, (r+1)·E/P). Rows are sent sorted by expert, so that
one all-to-all with uneven splits brings them to their owners. The owner sorts them by local expert, applies the experts and
returns them the same way. Nothing is padded to a common capacity.

Legend: R·k rows sent by this rank, E experts, P expert_parallel_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from deepspeed.module_inject.auto_ep_layer import _AllToAllV, compute_split_plan
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from mme.model.decoder import Decoder
from mme.model.moe import offsets_of


class _Route(NamedTuple):
    input_splits: list[int]
    output_splits: list[int]
    to_expert_order: Tensor
    to_source_order: Tensor


class ExpertParallelDispatcher(MoE):
    """A DeepSpeed MoE layer with our gate and experts; it owns the process groups and the exchange.

    The engine recognises a model with experts by this class. It calls `set_deepspeed_parallelism` and reduces the experts'
    gradients over the ranks that hold the same experts.
    """

    def __init__(self, num_experts: int, expert_parallel_size: int) -> None:
        nn.Module.__init__(self)  # DeepSpeed's own constructor would build its gate and experts
        self.num_experts = num_experts
        self.ep_size = expert_parallel_size
        self.num_local_experts = num_experts // expert_parallel_size
        self.expert_group_name = f"ep_size_{expert_parallel_size}"
        self.enable_expert_tensor_parallelism = False
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(expert_parallel_size)
        self.group = groups._get_expert_parallel_group(self.expert_group_name)
        self.first_expert = self.num_local_experts * groups._get_expert_parallel_rank(self.expert_group_name)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing, because the constructor has made the groups."""

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, _Route]:
        plan = compute_split_plan(
            counts, self.num_experts, self.ep_size, self.num_local_experts, self.group, num_tokens_per_expert=counts
        )
        received = _AllToAllV.apply(self.group, rows, plan.input_splits, plan.output_splits)
        by_source = plan.local_counts_by_source  # (P, local experts) rows received
        order = _expert_major(by_source, received.shape[0])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        route = _Route(plan.input_splits, plan.output_splits, order, inverse)
        return received.index_select(0, order), offsets_of(by_source.sum(0)), route

    def combine(self, rows: Tensor, state: Any) -> Tensor:
        by_source = rows.index_select(0, state.to_source_order)
        return _AllToAllV.apply(self.group, by_source, state.output_splits, state.input_splits)


def spread_experts(decoder: Decoder, expert_parallel_size: int) -> None:
    """Keeps only this rank's share of every mixture's experts and connects the ranks by all-to-all.

    Copies of an expert on several ranks have equal values, because all ranks initialise the whole decoder identically.
    """
    for layer in decoder.moe_layers():
        dispatcher = ExpertParallelDispatcher(layer.num_experts, expert_parallel_size)
        layer.dispatcher = dispatcher
        first, last = dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local_experts
        for name, weight in list(layer.experts.named_parameters()):
            local = nn.Parameter(weight.detach()[first:last].clone())
            local.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's mark of an expert's parameter
            local.group_name = dispatcher.expert_group_name  # type: ignore[attr-defined]
            setattr(layer.experts, name, local)


def _expert_major(by_source: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) the index in source-major order of each row in expert-major order.

    by_source [[2, 1], [0, 3]] (2 sources, 2 local experts) → [0, 1, 2, 3, 4, 5]: source 0 sent rows 0-1 for expert 0 and
    row 2 for expert 1, source 1 rows 3-5 for expert 1.
    """
    counts = by_source.flatten()
    num_experts = by_source.shape[1]
    expert = torch.arange(num_experts, device=counts.device).repeat(by_source.shape[0])
    expert_of_row = torch.repeat_interleave(expert, counts, output_size=num_rows)
    return torch.argsort(expert_of_row, stable=True)
