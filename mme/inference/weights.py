"""Reads the weights of a checkpoint as whole tensors, without a process group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mme.distributed.checkpoint_index import Index, Progress, damage, folder, from_the_best, read_index
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
        index = read_index(run, candidate)
        if isinstance(index, str):
            flaw = UserError(index)
        else:
            flaw = damage(run, candidate, index.files)
            if flaw is None:
                return Checkpoint(index.progress, _whole_tensors(run, candidate, index))
        if candidate != candidates[-1]:
            print_line(f"checkpoint skipped: {flaw}")
    assert flaw is not None  # there is at least one candidate
    raise flaw


def _whole_tensors(run: Path, step: int, index: Index) -> dict[str, Tensor]:
    names = {piece.name for entry in index.files for piece in entry.pieces}
    weights: dict[str, Tensor] = {}
    for entry in index.files:
        with safe_open(folder(run, step) / entry.file, framework="pt") as file:
            for piece in entry.pieces:
                # The name of an optimizer state begins with that of its weight.
                if not piece.name.startswith(WEIGHTS) or piece.name.rpartition("/")[0] in names:
                    continue
                if piece.name not in weights:
                    weights[piece.name] = torch.empty(piece.shape)
                place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.local_shape, strict=True))
                weights[piece.name][place] = file.get_tensor(piece.key)
    return weights
