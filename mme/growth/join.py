"""Finds the rows of a checkpoint that the tables of a run continue.

`mme prepare --add-to` keeps the numbers of a set's items, users and feature values, so the rows of a set that has grown begin
with those that it had.
"""

from __future__ import annotations

from pathlib import Path

from mme.config import ModelConfig
from mme.data.dataset import PreparedDataset
from mme.data.numbering import numbering_sha256
from mme.distributed.checkpoint import ELSEWHERE
from mme.distributed.checkpoint_index import Progress, folder
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import RowSource
from mme.errors import UserError
from mme.growth.known import extent_of
from mme.model.feature_rows import ITEMS, blocks_of


def grown_since(progress: Progress, run: Path, dataset: PreparedDataset, recommender: Recommender) -> RowSource | None:
    """The rows of a run's checkpoint that the tables continue if the data set has grown since; None: it is the same set.

    A collective: rank 0 reads the numbering.

    Raises:
        UserError: the checkpoint was trained on another set.
    """
    config, world = recommender.config, recommender.world
    if progress.dataset in ("", dataset.sha256):
        return None
    has_grown = (
        progress.num_runs < dataset.num_runs
        and dataset.runs_sha256(progress.num_runs) == progress.runs
        and world.of_first(world.rank == 0 and _begins_with(dataset, progress, config.model))
    )
    if not has_grown:
        raise UserError(
            f"{folder(run, progress.step)}: was trained on a data set other than the one in data.path={config.data.path}, which "
            f"`mme prepare --add-to` has not made of it ({ELSEWHERE})"
        )
    return RowSource(recommender.rows.blocks, blocks_of(progress.rows))


def describe_new_rows(source: RowSource) -> str:
    """Such as ``12 of 5,000 items and 1 of 6 rows of event_features.rating are new``."""
    kinds = [
        f"{count:,} of {len(source.blocks[name]):,} {name if name == ITEMS else f'rows of {name}'}"
        for name, count in source.num_new().items()
        if count or name == ITEMS
    ]
    return f"{' and '.join(kinds)} are new"


def _begins_with(dataset: PreparedDataset, progress: Progress, model: ModelConfig) -> bool:
    extent = extent_of(progress, model)
    if extent is None:
        return False
    return progress.numbering == numbering_sha256(dataset.folder, dataset.info, model.feature_columns, extent)
