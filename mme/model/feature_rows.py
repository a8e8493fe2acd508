"""Rows of the tables for feature values: after the items, one block of rows per column.

Every column has its own embeddings in each of the M tables. As rows of the same tables they are sharded, updated and saved
like items, for columns of five values or of a hundred million users, and the single lookup of a step also fetches them.
Index 0 of each block stands for a missing or unknown value.

Legend: B sequences, T tokens, F event features, G user features.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mme.config import ModelConfig
from mme.data.batch import SequenceBatch

ITEMS = "items"  # the key of the items' block


class InputRows(NamedTuple):
    """Table rows of a batch's tokens, all int64: of items (T,), event features (T, F) and user features (B, G)."""

    items: Tensor
    events: Tensor
    users: Tensor


class FeatureRows:
    """Maps items and feature values to rows of the tables.

    Args:
        sizes: for each column in `model.event_features` and `model.user_features`, its number of values plus one.
        substitutes: for a column, the indices that stand for those from its size on, which have no row; others are unknown.

    Attributes:
        num_rows: number of rows of each table, for items and features.
        blocks: the rows of the items, under `ITEMS`, and of each column, under its key such as ``event_features.rating``.
    """

    def __init__(
        self,
        model: ModelConfig,
        num_items: int,
        sizes: Mapping[str, int],
        substitutes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.num_items = num_items
        keys = feature_keys(model)
        self.blocks = blocks_of({ITEMS: num_items, **{key: sizes[name] for key, name in keys.items()}})
        self._substitutes = [(substitutes or {}).get(name) for name in keys.values()]
        _, *columns = self.blocks.values()
        self.firsts = [block.start for block in columns]
        self.num_rows = max(block.stop for block in self.blocks.values())
        self.num_event_features = len(model.event_features)

    def inputs_of(self, batch: SequenceBatch) -> InputRows:
        """The table rows of the items and features of a batch; a number that has no row counts as unknown."""
        _, *blocks = self.blocks.values()
        columns = list(zip(blocks, self._substitutes, strict=True))
        of_events, of_users = columns[: self.num_event_features], columns[self.num_event_features :]
        events, users = batch.event_features, batch.user_features
        return InputRows(
            batch.item_ids,
            batch.item_ids.new_zeros(batch.num_tokens, 0) if events is None else _rows(events, of_events),
            batch.item_ids.new_zeros(batch.num_sequences, 0) if users is None else _rows(users, of_users),
        )


def feature_keys(model: ModelConfig) -> dict[str, str]:
    """The key and the column of each block of feature rows, in order: ``event_features.rating`` and ``rating``."""
    return {f"event_features.{name}": name for name in model.event_features} | {
        f"user_features.{name}": name for name in model.user_features
    }


def blocks_of(lengths: Mapping[str, int]) -> dict[str, range]:
    """Consecutive blocks of these lengths: ``{"items": 5, "event_features.rating": 3}`` → items 0 to 4, ratings 5 to 7."""
    ends = list(accumulate(lengths.values()))
    return {name: range(end - length, end) for (name, length), end in zip(lengths.items(), ends, strict=True)}


def _rows(values: Tensor, columns: list[tuple[range, Tensor | None]]) -> Tensor:
    """(n, columns) numbers of values in each column → their rows."""
    return torch.stack([_known(values[:, i], *column) + column[0].start for i, column in enumerate(columns)], dim=1)


def _known(numbers: Tensor, block: range, substitutes: Tensor | None) -> Tensor:
    """(n,) numbers that have a row in the block, for any numbers, (n,)."""
    # Bounds as scalars: a tensor of them would be copied from host memory, and the step would wait for it.
    known = numbers.masked_fill(numbers >= len(block), 0)
    if substitutes is None:
        return known
    beyond = (numbers - len(block)).clamp(0, substitutes.numel() - 1)
    is_substituted = (numbers >= len(block)) & (numbers < len(block) + substitutes.numel())
    return torch.where(is_substituted, substitutes.to(numbers.device)[beyond], known)
