"""Loads a trained model from a run's folder: its configuration, its best checkpoint and facts from its data set."""

from __future__ import annotations

from pathlib import Path

import torch

from mme.config import load_run_config
from mme.data.description import read_info
from mme.data.numbering import Numbering, numbering_sha256, read_item_counts
from mme.data.times import time_range
from mme.distributed.checkpoint_index import best_step
from mme.errors import UserError
from mme.inference.model import Knowledge, TrainedModel
from mme.inference.weights import read_checkpoint


def load_run(run: Path, step: int | None = None, device: str | torch.device | None = None) -> TrainedModel:
    """Loads checkpoint ``step`` of a run; None selects the best by validation.

    Raises:
        UserError: the run, its data set or the checkpoint is missing or damaged, or they do not match.
    """
    config = load_run_config(run)
    data = Path(config.data.path)
    info = read_info(data)
    numbering = Numbering.read(data, info, config.model.feature_columns)
    checkpoint = read_checkpoint(run, step)
    if checkpoint.numbering not in ("", numbering_sha256(data, info, config.model.feature_columns)):
        raise UserError(
            f"{run}: step {checkpoint.step} was trained on a data set whose indices of items or feature values differ from "
            f"those of {data}"
        )
    knowledge = Knowledge(numbering, read_item_counts(data), time_range(data, info))
    return TrainedModel(config, knowledge, checkpoint.weights, f"{run}@step_{checkpoint.step}", device)


def version_of(path: Path) -> tuple[int, ...]:
    """A value that changes when ``path`` gets a better checkpoint or another export.

    Raises:
        UserError: the run has no complete checkpoint.
        OSError: the path does not exist.
    """
    if path.is_dir():
        return (best_step(path),)
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
