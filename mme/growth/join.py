"""Finds the rows of a checkpoint that the tables of a run continue.

`mme prepare --add-to` keeps the numbers of a set's items, users and feature values, so the rows of a set that has grown begin
with those that it had. The rows of another run are joined by raw item id, raw user id and the text of feature values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mme.config import USER_ID, Config, ModelConfig, load_run_config
from mme.data.dataset import PreparedDataset
from mme.data.description import read_info
from mme.data.numbering import Numbering, numbering_sha256
from mme.data.remote_set import local_folder
from mme.distributed.checkpoint import ELSEWHERE
from mme.distributed.checkpoint_index import Progress, folder
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import NEW, RowSource
from mme.errors import UserError
from mme.growth.known import extent_of, known_extent
from mme.model.feature_rows import ITEMS, blocks_of, feature_keys


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
            f"{folder(run, progress.step)}: was trained on a data set that is neither data.path={config.data.path} nor an earlier "
            f"state of it ({ELSEWHERE})"
        )
    return RowSource(recommender.rows.blocks, blocks_of(progress.rows))


def _begins_with(dataset: PreparedDataset, progress: Progress, model: ModelConfig) -> bool:
    extent = extent_of(progress, model)
    if extent is None:
        return False
    return progress.numbering == numbering_sha256(dataset.folder, dataset.info, model.feature_columns, extent)


@dataclass(frozen=True)
class EarlierRun:
    """A run whose weights another one starts with (`train.init_from`)."""

    folder: Path
    config: Config

    @classmethod
    def open(cls, run: Path, config: Config) -> EarlierRun:
        """Reads the configuration of the run in the folder ``run``.

        Args:
            config: of the run that is to start.

        Raises:
            UserError: the folder is not that of a run, is ``config.output_dir``, or the run's views have another width.
        """
        if not run.is_dir():
            raise UserError(f"train.init_from={run}: no such folder: expected that of a run")
        if run.resolve() == Path(config.output_dir).resolve():
            raise UserError(f"train.init_from={run}: is output_dir: expected another run; train.resume resumes one")
        earlier = load_run_config(run)
        if earlier.model.view_dim != config.model.view_dim:
            raise UserError(
                f"train.init_from={run}: its views are {earlier.model.view_dim} wide (model.embedding_dim / "
                f"model.num_tables), expected {config.model.view_dim} as in this configuration"
            )
        return cls(run, earlier)

    def rows(self, progress: Progress, dataset: PreparedDataset, recommender: Recommender) -> RowSource:
        """The rows of the run's checkpoint that the tables continue.

        Raises:
            UserError: the run's data set can't be read or no longer begins with the items and values that the checkpoint was
                trained on, or its ids are of another type than those of ``dataset``.
        """
        data, model = local_folder(self.config.data.path), self.config.model
        info = read_info(data)
        extent = known_extent(progress, f"train.init_from={self.folder}", data, info, model)
        theirs = _values(Numbering.read(data, info, model.feature_columns).first(extent), model)
        wanted = recommender.config.model
        ours = _values(Numbering.read(dataset.folder, dataset.info, wanted.feature_columns), wanted)
        sizes = {
            ITEMS: extent.num_items,
            **{key: extent.feature_sizes[name] for key, name in feature_keys(model).items()},
        }
        matches = {name: self._match(name, ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}
        return RowSource(recommender.rows.blocks, blocks_of(sizes), matches)

    def _match(self, name: str, ours: _Values, theirs: _Values) -> Tensor:
        """For each row of a block of ours, its place in the block of theirs, or `NEW`."""
        if theirs.kind != ours.kind:
            what = "item ids" if name == ITEMS else f"values of {name}"
            raise UserError(
                f"train.init_from={self.folder}: its {what} are {theirs.kind}, expected {ours.kind} as in this data set"
            )
        places = pc.index_in(ours.values, theirs.values.cast(ours.values.type)).fill_null(NEW)
        matches = torch.from_numpy(places.to_numpy(zero_copy_only=False).copy()).long()
        if name == ITEMS:
            return matches
        # The first row of a feature's block is that of missing values.
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.where(matches == NEW, NEW, matches + 1)])


class _Values(NamedTuple):
    """The raw ids or values of a block's rows, for a feature without its first row, which stands for missing values.

    ``kind``: their type, for messages and comparison.
    """

    kind: str
    values: pa.Array

    @classmethod
    def of_ids(cls, ids: pa.Array) -> _Values:
        return cls("integers" if pa.types.is_integer(ids.type) else "texts", ids)


def _values(numbering: Numbering, model: ModelConfig) -> dict[str, _Values]:
    """The values of each block, by its key."""
    found = {ITEMS: _Values.of_ids(numbering.item_ids)}
    for key, name in feature_keys(model).items():
        if name == USER_ID:
            found[key] = _Values.of_ids(numbering.user_ids)
        else:
            vocabulary = numbering.vocabularies[name]
            found[key] = _Values(f"of kind {vocabulary.kind}", pa.array(vocabulary.numbers, pa.string()))
    return found


def describe_new_rows(source: RowSource) -> str:
    """The numbers of new rows, such as ``12 of 5,000 items and 1 of 6 rows of event_features.rating are new``."""
    kinds = [
        f"{count:,} of {len(source.blocks[name]):,} {name if name == ITEMS else f'rows of {name}'}"
        for name, count in source.num_new().items()
        if count or name == ITEMS
    ]
    return f"{' and '.join(kinds)} are new"


def describe_left_out(names: list[str]) -> str:
    """The tensors that keep their initial values; an optimizer state is named only if its weight is not."""
    weights = set(names)
    return ", ".join(name for name in names if name.rpartition("/")[0] not in weights)
