"""Reads the weights of a checkpoint as whole tensors, without a process group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mme.distributed.checkpoint_index import Index, Progress, from_the_best
from mme.distributed.checkpoint_parts import assemble, checked, parts_of
from mme.errors import NonFiniteError, UserError, print_line

WEIGHTS = ("tables/", "decoder/")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint.

    Attributes:
        progress: how far training had come.
        weights: whole float32 tensors by name, such as `tables/item_0` and `decoder/blocks.0.uvqk`; no optimizer states.
    """

    progress: Progress
    weights: dict[str, Tensor]


def read_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """Reads checkpoint ``step``; None selects the best by validation that is not damaged.

    Raises:
        UserError: there is no such checkpoint, or all candidates are damaged.
        NonFiniteError: the same, if the damage is a weight or optimizer state that is NaN or infinite.
    """
    candidates = from_the_best(run) if step is None else [step]
    flaw: UserError | NonFiniteError | None = None
    for candidate in candidates:
        found = checked(run, candidate)
        if isinstance(found, Index):
            return Checkpoint(found.progress, _whole_tensors(run, found))
        flaw = found
        if candidate != candidates[-1]:
            print_line(f"checkpoint skipped: {flaw}")
    assert flaw is not None  # there is at least one candidate
    raise flaw


def _whole_tensors(run: Path, index: Index) -> dict[str, Tensor]:
    parts = parts_of(run, index)
    # The name of an optimizer state begins with that of its weight.
    names = [name for name in parts if name.startswith(WEIGHTS) and name.rpartition("/")[0] not in parts]
    return {name: assemble(_Whole(parts[name][0][1].shape), parts[name]) for name in names}


@dataclass(frozen=True)
class _Whole:
    """The position of a whole tensor."""

    local_shape: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        return (0,) * len(self.local_shape)
