"""Loads a trained model from a run's folder: its configuration, its best checkpoint and facts from its data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mme.config import Config, load_config, load_run_config, validate_world_size
from mme.data.description import read_info
from mme.data.numbering import Numbering, read_item_counts
from mme.data.parts import check_files
from mme.data.remote_set import local_folder
from mme.data.times import time_range
from mme.distributed.checkpoint_index import best_step, folder
from mme.growth.known import known_extent
from mme.inference.model import Knowledge, TrainedModel
from mme.inference.weights import read_checkpoint
from mme.installation import prepare_training

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished training job.

    Attributes:
        folder: contains configuration, checkpoints, metrics.jsonl and report.html.
        metrics: test metrics of the chosen checkpoint, such as ``ndcg@10``, with protocol, step and targets.
        popularity: the same metrics of the ranking by popularity.
    """

    folder: Path
    metrics: Metrics
    popularity: Metrics

    def load(self, device: str | torch.device | None = None, checkpoint: int | None = None) -> TrainedModel:
        """The trained model; see `mme.load`."""
        return load_run(self.folder, checkpoint, device)


def train_run(config: Config | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Run:
    """See `mme.train`."""
    settings = load_config(config, list(overrides))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    validate_world_size(settings, world_size)
    prepare_training()
    from mme.report.page import write_report
    from mme.training import train

    metrics, popularity = train(settings)
    folder = Path(settings.output_dir)
    if os.environ.get("RANK", "0") == "0":
        write_report(folder)
    return Run(folder, metrics, popularity)


def load_run(run: Path, step: int | None = None, device: str | torch.device | None = None) -> TrainedModel:
    """Loads checkpoint ``step`` of a run; None selects the best by validation.

    Raises:
        UserError: the run, its data set or the checkpoint is missing or damaged, or they do not match.
    """
    config = load_run_config(run)
    data = local_folder(config.data.path)
    info = read_info(data)
    check_files(data, info)
    checkpoint = read_checkpoint(run, step)
    trained = checkpoint.progress.step
    extent = known_extent(checkpoint.progress, folder(run, trained), data, info, config.model)
    numbering = Numbering.read(data, info, config.model.feature_columns).first(extent)
    knowledge = Knowledge(numbering, read_item_counts(data)[: extent.num_items], time_range(data, info))
    return TrainedModel(config, knowledge, checkpoint.weights, f"{run}@step_{trained}", device)


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
