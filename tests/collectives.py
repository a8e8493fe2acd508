"""Counts the collectives of this process by the line of this project that starts them, with their kind and bytes."""

from __future__ import annotations

from typing import Any

import torch.distributed  # noqa: F401  # registers the operators of c10d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.synchronisations import caller

# Operators of c10d → the kind of collective, and the position of the argument that this rank sends.
KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all-gather", 1),
    "_allgather_base_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "allgather_coalesced_": ("all-gather", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_": ("all-to-all", 1),
    "alltoall_base_": ("all-to-all", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "barrier": ("barrier", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


class Collectives(TorchDispatchMode):
    """While active, ``found`` lists each collective as (file, function, kind, bytes that this rank contributes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str, int]] = []

    def __torch_dispatch__(
        self, call: Any, kinds: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        if call.namespace == "c10d":
            kind, sent = KINDS[call._opname]
            values = [leaf for leaf in tree_leaves(arguments[sent]) if isinstance(leaf, Tensor)]
            self.found.append((*caller(), kind, sum(value.nbytes for value in values)))
        return call(*arguments, **(named or {}))
