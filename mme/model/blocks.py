"""The kinds of block that `model.block` names.

A block is a module called as ``block(x, seq_offsets, timestamps, plan, dropout_keys)`` with x (M, T, d), which returns the same
shape and the routing of its experts, or None. ``dropout_keys`` (M, T) int64 are None without dropout (`kernels.dropout`). To add
a kind, write its module, add an entry here, and add its name to `mme.config.schema`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mme.config import Config
from mme.model.baselines import HSTUBlock, LiGRBlock, SASRecBlock
from mme.model.fuxi_block import FuxiBlock
from mme.model.moe import DenseFFN, MixtureOfExperts


def fuxi(config: Config, index: int) -> FuxiBlock:
    model, moe, backend = config.model, config.model.moe, config.kernels.backend
    ffn: DenseFFN | MixtureOfExperts
    if index in model.expert_blocks:
        ffn = MixtureOfExperts(
            moe.num_experts,
            moe.top_k,
            model.view_dim,
            model.hidden_dim,
            moe.renormalize,
            backend,
            moe.capacity_factor,
            views_seen=model.router_views,
        )
    else:
        ffn = DenseFFN(model.view_dim, model.hidden_dim, backend)
    dqk, dv = model.head_dims
    return FuxiBlock(model.view_dim, config.data.max_seq_len, model.num_heads, dqk, dv, ffn, model.dropout, backend)


def hstu(config: Config, index: int) -> HSTUBlock:
    model = config.model
    return HSTUBlock(model.view_dim, config.data.max_seq_len, model.num_heads, *model.head_dims, model.dropout)


def sasrec(config: Config, index: int) -> SASRecBlock:
    model, choices = config.model, config.model.sasrec
    return SASRecBlock(
        model.view_dim,
        model.num_heads,
        *model.head_dims,
        model.hidden_dim,
        model.dropout,
        choices.norm_first,
        choices.attention_output_dropout,
    )


def ligr(config: Config, index: int) -> LiGRBlock:
    model = config.model
    return LiGRBlock(model.view_dim, model.num_heads, *model.head_dims, model.hidden_dim, model.dropout)


BLOCKS: dict[str, Callable[[Config, int], nn.Module]] = {"fuxi": fuxi, "hstu": hstu, "sasrec": sasrec, "ligr": ligr}


def make_block(config: Config, index: int) -> nn.Module:
    """The block number ``index``, from 0, of the decoder."""
    return BLOCKS[config.model.block](config, index)
