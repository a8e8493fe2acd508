"""Resumes training from a run's checkpoint, on the same data set or after it has grown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mme.data.dataset import PreparedDataset
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import Progress
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import start_at_the_mean
from mme.growth.join import describe_new_rows, grown_since

Note = Callable[[str], Any]


def resume(
    run: Path, dataset: PreparedDataset, recommender: Recommender, engine: Any, note: Note
) -> tuple[Progress, bool] | None:
    """Restores the newest sound checkpoint of a run. Returns its progress and whether the data set has grown since.

    Returns None if there is no checkpoint; the tables are then not initialised. If the set has grown, the epoch in progress
    ends, because its order of sequences was that of the smaller set.

    Raises:
        UserError: all checkpoints are damaged, or the newest belongs to another configuration or data set.
    """
    advice = "train.resume=false removes them and starts from step 0"
    index = checkpoint.newest_sound(run, recommender.world, note, advice)
    if index is None:
        return None
    progress = index.progress
    source = grown_since(progress, run, dataset, recommender)
    if source is None:
        checkpoint.load_training(run, index, recommender, engine)
        return progress, False
    recommender.tables.initialise(source.is_new)
    checkpoint.load_training(run, index, recommender, engine, source)
    if recommender.config.model.new_items == "mean":
        start_at_the_mean(recommender, source)
    note(f"{dataset.folder} has grown since step {progress.step}: {describe_new_rows(source)}")
    epoch = progress.epoch + (progress.sequences > 0)
    return replace(progress, epoch=epoch, sequences=0, evaluate=False, score=None), True
