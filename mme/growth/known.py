"""What a checkpoint knows of a data set: the items and feature values that the set had when the model was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mme.config import USER_ID, ModelConfig
from mme.data.features import feature_sizes, read_vocabularies
from mme.data.numbering import Extent, numbering_sha256
from mme.distributed.checkpoint_index import Progress
from mme.errors import UserError
from mme.model.feature_rows import ITEMS, feature_keys


def known_extent(
    progress: Progress, checkpoint: Path | str, data: Path, info: dict[str, Any], model: ModelConfig
) -> Extent:
    """How much of the data set's numbering a checkpoint knows: all of it, or less if the set has grown since.

    Args:
        checkpoint: names the checkpoint in the message.
        info: the content of dataset.json of the set in ``data``.

    Raises:
        UserError: the set does not begin with the items and values that the checkpoint was trained on.
    """
    features = model.feature_columns
    sizes = feature_sizes(data, info, features)
    extent = extent_of(progress, model) or Extent(info["num_items"], sizes)
    require_numbering(progress, checkpoint, numbering_sha256(data, info, features, extent), data)
    return extent


def substitutes(extent: Extent, data: Path, info: dict[str, Any], model: ModelConfig) -> dict[str, Tensor]:
    """For each column with values that the model does not know, the indices that stand for them, as in requests.

    A number in an unknown bucket counts as one in the nearest known bucket.
    """
    sizes = feature_sizes(data, info, model.feature_columns)
    grown = [name for name in model.feature_columns if name != USER_ID and sizes[name] > extent.feature_sizes[name]]
    found = {}
    for name, vocabulary in read_vocabularies(data, grown).items():
        values = list(vocabulary.numbers)
        num_known = extent.num_values(name)
        known = type(vocabulary)(values[:num_known])
        found[name] = torch.tensor([known.index_of(value) for value in values[num_known:]])
    return found


def require_numbering(progress: Progress, checkpoint: Path | str, numbering: str, data: Path | str) -> None:
    """Raises UserError if the checkpoint was trained with another numbering than ``numbering``, see `numbering_sha256`."""
    is_known = progress.numbering or progress.rows  # checkpoints of old versions may have neither
    if is_known and progress.numbering != numbering:
        raise UserError(
            f"{checkpoint}: was trained on a data set whose indices of items or feature values differ from those of {data}"
        )


def extent_of(progress: Progress, model: ModelConfig) -> Extent | None:
    """The items and values that have a row in the checkpoint's tables; None if it does not say, or has other features."""
    keys = feature_keys(model)
    if progress.rows.keys() != {ITEMS, *keys} or 0 in progress.rows.values():
        return None
    return Extent(progress.rows[ITEMS], {name: progress.rows[key] for key, name in keys.items()})
