"""The content of a checkpoint, as named pieces of tensors that can be loaded on any number of processes.

A piece is this rank's part of a tensor: a shard of an item table, the experts that it owns, or the whole of another
decoder parameter. The names of optimizer states extend those of their weights: `tables/item_0`, `tables/item_0/exp_avg`,
`decoder/blocks.0.uvqk`, `decoder/blocks.0.uvqk/exp_avg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.utils import (
    groups,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from mme.distributed.engine import ADAM_STATES
from mme.distributed.recommender import Recommender
from mme.distributed.tables import Shard


@dataclass(frozen=True)
class Piece:
    """This rank's part of one tensor.

    Attributes:
        name: name of the whole tensor.
        shape: shape of the whole tensor.
        offsets: position of this part in the whole.
        local_shape: shape of this part.
        writer: whether this rank, of those with a copy of the part, saves it.
        read: returns the part in float32. A collective: all ranks that have the piece call it in the same order.
        write: replaces the part by a tensor of ``local_shape``.
        is_copy: whether ``read`` of a table's piece returns a copy instead of a view of the table.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]
    writer: bool
    read: Callable[[], Tensor]
    write: Callable[[Tensor], Any]
    is_copy: bool = False


def weight_pieces(recommender: Recommender) -> Iterator[Piece]:
    """The weights of item tables, decoder and experts."""
    yield from _table_pieces(recommender, recommender.tables.weights())
    for name, parameter, part in _decoder_parts(recommender):
        yield part(f"decoder/{name}", read=parameter.detach, write=partial(_set_weight, parameter))


def optimizer_pieces(recommender: Recommender) -> Iterator[Piece]:
    """The optimizer states of tables and decoder, which must be in a DeepSpeed engine."""
    yield from _table_pieces(recommender, recommender.tables.optimizer_states())
    for name, parameter, part in _decoder_parts(recommender):
        for state in ADAM_STATES:
            yield part(
                f"decoder/{name}/{state}",
                read=partial(safe_get_full_optimizer_state, parameter, state),
                write=partial(_set_state, parameter, state),
            )


def _table_pieces(recommender: Recommender, shards: Iterator[Shard]) -> Iterator[Piece]:
    for shard in shards:
        local_shape = tuple(shard.tensor.shape)
        writer = recommender.world.rank == 0 or shard.name.partition("/")[0] not in recommender.tables.replicated
        tensor = shard.tensor.detach()
        yield Piece(
            f"tables/{shard.name}",
            shard.shape,
            shard.offsets,
            local_shape,
            writer,
            read=tensor.float,  # the tensor itself if it is float32
            write=tensor.copy_,
            is_copy=tensor.dtype != torch.float32,
        )


def _decoder_parts(recommender: Recommender) -> Iterator[tuple[str, nn.Parameter, Callable[..., Piece]]]:
    """Names and parameters of the decoder, each with a `Piece` constructor that knows the part's position."""
    decoder = recommender.decoder
    place: dict[int, tuple[int, int, bool]] = {}
    for layer in decoder.moe_layers():
        dispatcher: Any = layer.dispatcher
        writer = groups._get_expert_data_parallel_rank(dispatcher.expert_group_name) == 0
        for weight in layer.experts.parameters():
            place[id(weight)] = (layer.num_experts, dispatcher.first_expert, writer)
    for name, parameter in decoder.named_parameters():
        shape = tuple(parameter.shape)
        if id(parameter) in place:
            num_experts, first_expert, writer = place[id(parameter)]
            whole, offsets = (num_experts, *shape[1:]), (first_expert, *(0 for _ in shape[1:]))
        else:
            whole, offsets, writer = shape, (0,) * len(shape), recommender.world.rank == 0
        yield (
            name,
            parameter,
            partial(Piece, shape=whole, offsets=offsets, local_shape=shape, writer=writer),
        )


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data.copy_(value)
    safe_set_full_fp32_param(parameter, value.to(parameter.device))  # ZeRO's partition, if there is one


def _set_state(parameter: nn.Parameter, state: str, value: Tensor) -> None:
    safe_set_full_optimizer_state(parameter, value.to(parameter.device), state)
