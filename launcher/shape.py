"""The sizes of a training step on one rank. `plan` computes memory and time from them.

Legend: B sequences of a rank, N max_seq_len, T = B·N tokens, M views, D total width, d view width, H heads, E experts,
k top_k, f hidden width, U distinct items of a step, n negatives of a token, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from mme import flops
from mme.config import Config
from mme.devices import Device
from mme.errors import UserError
from mme.table_placement import (
    Bytes,
    Parts,
    choose_placement,
    on_fullest_rank,
    parts_of,
    parts_on_fullest_rank,
    views_together,
)

NUM_TIME_BUCKETS = 129  # as in `kernels.relative_attention.reference`, which imports torch


@dataclass(frozen=True)
class Shape:
    """A configuration on ``ranks`` processes with a catalogue of ``items``.

    Raises:
        UserError: the model's block is not ``fuxi``.
    """

    config: Config
    ranks: int
    ranks_per_node: int
    items: int
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        if self.config.model.block != "fuxi":
            raise UserError(f"model.block ({self.config.model.block}): plan supports only fuxi")

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.ranks_per_node)

    @property
    def precision(self) -> str:
        """Data type of the decoder's products: ``float32`` or ``bfloat16``."""
        return self.config.train.precision_on(self.device_type)

    @property
    def number_bytes(self) -> int:
        """Bytes of one number in the decoder."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def tokens(self) -> int:
        data = self.config.data
        return data.tokens_per_batch or data.batch_size * data.max_seq_len

    @property
    def rows(self) -> int:
        """Tokens of all views."""
        return self.tokens * self.config.model.num_tables

    @property
    def qk_width(self) -> int:
        """H·dqk."""
        return flops.head_widths(self.config.model)[0]

    @property
    def v_width(self) -> int:
        """H·dv."""
        return flops.head_widths(self.config.model)[1]

    @property
    def uvqk_width(self) -> int:
        return 4 * self.v_width + 2 * self.qk_width

    @property
    def hidden(self) -> int:
        return self.config.model.hidden_dim

    @property
    def expert_blocks(self) -> int:
        return len(self.config.model.expert_blocks)

    @property
    def expert_parallel_size(self) -> int:
        return self.config.experts_over(self.ranks)

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // self.expert_parallel_size

    @property
    def top_k(self) -> int:
        return self.config.model.moe.top_k

    @property
    def negative_sets(self) -> int:
        return self.config.loss.num_groups(self.tokens)

    @property
    def scored(self) -> int:
        """Items that the loss scores for each token, its target included."""
        return self.config.loss.num_scored(self.items)

    @cached_property
    def distinct_items(self) -> int:
        """Expected U if items are drawn uniformly; a skewed catalogue gives fewer."""
        loss = self.config.loss
        if loss.is_full_softmax:
            return self.items
        drawn = loss.uniform_share if loss.sampling == "in_batch" else 1  # the others are targets of the batch
        draws = 2 * self.tokens + drawn * self.negative_sets * loss.num_negatives
        return math.ceil(self.items * -math.expm1(-draws / self.items))

    @property
    def ids_sent(self) -> int:
        """Ids that a rank sends to the owners of their rows: once for each stored table."""
        together = views_together(self.config, self.config.parallel.table_sharding, self.ranks)
        return self.distinct_items * self.config.model.num_tables // together

    @property
    def looked_up(self) -> int:
        """Numbers in the rows that a rank looks up, U·D."""
        return self.distinct_items * self.config.model.embedding_dim

    @property
    def is_sharded(self) -> bool:
        return self.config.parallel.table_sharding != "data_parallel"

    @property
    def table_parts(self) -> Parts:
        """How TorchRec divides each table."""
        return parts_of(self.config, self.config.parallel.table_sharding, self.items, self.ranks)

    @property
    def tables_held(self) -> int:
        """Parts of tables on the rank that holds most of them."""
        return parts_on_fullest_rank(self.config, self.config.parallel.table_sharding, self.items, self.ranks)

    @property
    def table_elements(self) -> int:
        """Weights of the item tables on the fullest rank."""
        return self.tables_held * self.table_parts.rows * self.table_parts.columns

    def table_bytes(self, placement: str) -> Bytes:
        """Memory of the item tables on the fullest rank, in the given ``placement``."""
        return on_fullest_rank(self.config, self.config.parallel.table_sharding, self.items, self.ranks, placement)

    def table_placement(self, device: Device) -> str:
        """Where the item tables live on ``device``.

        Raises:
            UserError: see `mme.table_placement.choose_placement`.
        """
        return choose_placement(self.config, self.items, self.ranks, device)

    @property
    def table_skew(self) -> float:
        """The fullest rank's part of the tables, as a multiple of an even share."""
        if not self.is_sharded:
            return 1.0
        return self.table_elements * self.ranks / (self.items * self.config.model.embedding_dim)

    @property
    def dense_parameters(self) -> int:
        """Weights that every rank holds: everything except tables and experts."""
        model, d = self.config.model, self.config.model.view_dim
        block = flops.projections(model) + d + NUM_TIME_BUCKETS + 2 * self.config.data.max_seq_len - 1
        ffn = (model.num_blocks - self.expert_blocks) * flops.expert_row(model)
        router = self.expert_blocks * d * model.moe.num_experts * model.router_views**2
        positions = (model.num_tables if model.positions == "per_view" else 1) * self.config.data.max_seq_len * d
        return model.num_blocks * block + ffn + router + positions

    @property
    def expert_parameters(self) -> int:
        """Expert weights that one rank holds."""
        model = self.config.model
        experts = model.moe.num_experts // self.expert_parallel_size
        return self.expert_blocks * experts * flops.expert_row(model)
