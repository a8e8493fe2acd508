"""The decoder that all views share: input views and the stack of blocks.

Legend: B sequences, N max_seq_len, T tokens, M views, d view width, U distinct items of a batch, F event and G user features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import plan_attention
from kernels.splitmix import derive
from mme.config import Config
from mme.model.blocks import make_block
from mme.model.fuxi_block import FuxiBlock
from mme.model.inputs import InputViews, UserTokens, positions_in_sequence
from mme.model.layers import EPS, layer_norm
from mme.model.moe import MixtureOfExperts, Routing
from mme.profiling.regions import region


@dataclass(frozen=True)
class DecoderOutput:
    """The final views and the routers' decisions.

    Attributes:
        hidden: (T, M, d) in `train.precision`, the final views of each item token.
        routing: the routing of each block with experts, in order; it includes the users' tokens.
        item_places: (T,) int64, positions of the item tokens among all tokens; None: there are only item tokens.
    """

    hidden: Tensor
    routing: list[Routing]
    item_places: Tensor | None = None


class Decoder(nn.Module):
    """Passes all M views of a batch through one stack of blocks in one call."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.backend = config.kernels.backend
        self.precision_on = config.train.precision_on
        self.recompute = config.train.recompute == "blocks"
        self.max_seq_len = config.data.max_seq_len
        self.num_views, self.dropout = model.num_tables, model.dropout
        self.inputs = InputViews(
            model.num_tables, model.view_dim, self.max_seq_len, model.dropout, model.positions, model.positions_from
        )
        self.blocks = nn.ModuleList(make_block(config, index) for index in range(model.num_blocks))
        self.final_norm = nn.LayerNorm(model.view_dim, eps=EPS) if model.final_norm else None
        self.plans_attention = any(isinstance(block, FuxiBlock) for block in self.blocks)

    def forward(
        self,
        item_rows: Tensor,
        item_index: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor,
        event_index: Tensor | None = None,
        user_index: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> DecoderOutput:
        """
        Args:
            item_rows: (U, M, d) rows of the batch's distinct items and features in the M tables.
            item_index: (T,) int64, the row of each token's item.
            seq_offsets: (B + 1,) int64.
            timestamps: (T + B,) int64 seconds.
            event_index: (T, F) int64, the rows of each token's event features; None or F = 0: no features.
            user_index: (B, G) int64, the rows of each user's features. They form a token before the sequence, to which all
                its tokens attend; None or G = 0: no such token.
            dropout_keys: (B,) int64, a random key per sequence and step, which determines all its dropout. Required in
                training with dropout.

        Blocks compute in `train.precision` and cast their float32 weights to it.
        """
        user_tokens = None
        with region("lookup"):
            if user_index is not None and user_index.shape[1]:
                user_tokens = UserTokens.before(seq_offsets, timestamps, item_index.numel())
                seq_offsets, timestamps = user_tokens.seq_offsets, user_tokens.timestamps
            num_tokens = item_index.numel() + (0 if user_tokens is None else seq_offsets.numel() - 1)
            keys = self._dropout_keys(dropout_keys, seq_offsets, num_tokens)
            x = self.inputs(
                item_rows, item_index, seq_offsets, event_index, user_index, user_tokens, _site_keys(keys, 0)
            ).to(getattr(torch, self.precision_on(item_rows.device.type)))
        plan = None
        if self.plans_attention:
            with region("attention"):
                plan = plan_attention(seq_offsets, self.max_seq_len, timestamps, backend=self.backend)
        routing = []
        for index, block in enumerate(self.blocks):
            with region("attention"):
                site_keys = _site_keys(keys, index + 1)
            inputs = x, seq_offsets, timestamps, plan, site_keys
            if self.recompute and self.training:
                x, block_routing = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, block_routing = block(*inputs)
            if block_routing is not None:
                routing.append(block_routing)
        item_places = None if user_tokens is None else user_tokens.item_places
        with region("loss"):
            hidden = (x if self.final_norm is None else layer_norm(x, self.final_norm)).transpose(0, 1)
            if item_places is not None:
                hidden = hidden[item_places]
        return DecoderOutput(hidden, routing, item_places)

    def _dropout_keys(self, sequence_keys: Tensor | None, seq_offsets: Tensor, num_tokens: int) -> Tensor | None:
        """(M, T) int64, a key for each view of each token; None without dropout."""
        if not self.training or not self.dropout:
            return None
        if sequence_keys is None:
            raise ValueError("dropout_keys are required in training with dropout")
        of_tokens = torch.repeat_interleave(sequence_keys, seq_offsets.diff(), output_size=num_tokens)
        of_tokens = derive(of_tokens, positions_in_sequence(seq_offsets, num_tokens))
        return derive(of_tokens, torch.arange(self.num_views, device=of_tokens.device)[:, None])

    def moe_layers(self) -> list[MixtureOfExperts]:
        """The mixtures of experts, in the order of the blocks."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]


def _site_keys(keys: Tensor | None, site: int) -> Tensor | None:
    """The keys of one dropout site: 0 for the inputs, 1 + i for block i."""
    return None if keys is None else derive(keys, site)
