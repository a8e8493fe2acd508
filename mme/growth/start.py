"""How training starts: from a run's own checkpoint, whose data set may have grown since, or from another run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mme.data.dataset import PreparedDataset
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import Progress
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import RowSource, start_at_the_mean
from mme.errors import UserError
from mme.growth.join import EarlierRun, describe_left_out, describe_new_rows, grown_since

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
    _start_new_rows(recommender, source)
    note(f"{dataset.folder} has grown since step {progress.step}: {describe_new_rows(source)}")
    epoch = progress.epoch + (progress.sequences > 0)
    return replace(progress, epoch=epoch, sequences=0, evaluate=False, score=None), True


def start_from(
    earlier: EarlierRun, dataset: PreparedDataset, recommender: Recommender, engine: Any, note: Note
) -> Progress:
    """Initialises tables and decoder with the weights and optimizer states of another run's newest sound checkpoint.

    Returns the progress at step 0.

    Raises:
        UserError: the run has no sound checkpoint, or its rows can't be joined.
    """
    advice = "train.init_from needs a sound one"
    index = checkpoint.newest_sound(earlier.folder, recommender.world, note, advice)
    if index is None:
        raise UserError(f"{earlier.folder}: no complete checkpoint: {advice}")
    source = earlier.rows(index.progress, dataset, recommender)
    recommender.tables.initialise()
    left_out: list[str] = []
    checkpoint.load_training(earlier.folder, index, recommender, engine, source, left_out)
    names = list(dict.fromkeys(name for names in recommender.world.gather_objects(left_out) for name in names))
    _start_new_rows(recommender, source, names)
    note(f"starts from step {index.progress.step} of {earlier.folder}: {describe_new_rows(source)}")
    if names:
        note(
            f"not in {earlier.folder} or of another shape there, so initialised as in a new model: "
            f"{describe_left_out(names)}"
        )
    return Progress(0, 0, 0, steps_before=index.progress.applied)


def _start_new_rows(recommender: Recommender, source: RowSource, left_out: Collection[str] = ()) -> None:
    if recommender.config.model.new_items == "mean":
        start_at_the_mean(recommender, source, left_out)
