"""Rows of the tables for feature values: after the items, one block of rows per column.

Every column has its own embeddings in each of the M tables. As rows of the same tables they are sharded, updated and saved
like items, for columns of five values or of a hundred million users, and the single lookup of a step also fetches them.
Index 0 of each block stands for a missing or unknown value.

Legend: B sequences, T tokens, F event features, G user features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mme.config import ModelConfig
from mme.data.batch import SequenceBatch


class InputRows(NamedTuple):
    """Table rows of a batch's tokens, all int64: of items (T,), event features (T, F) and user features (B, G)."""

    items: Tensor
    events: Tensor
    users: Tensor


class FeatureRows:
    """Maps items and feature values to rows of the tables.

    Args:
        sizes: for each column in `model.event_features` and `model.user_features`, its number of values plus one.

    Attributes:
        num_rows: number of rows of each table, for items and features.
    """

    def __init__(self, model: ModelConfig, num_items: int, sizes: Mapping[str, int]) -> None:
        self.num_items = num_items
        self.firsts = [num_items]
        for name in (*model.event_features, *model.user_features):
            self.firsts.append(self.firsts[-1] + sizes[name])
        self.num_rows = self.firsts.pop()
        self.num_event_features = len(model.event_features)

    def inputs_of(self, batch: SequenceBatch) -> InputRows:
        """The table rows of the items and features of a batch."""
        # Filled on the device: a copy of host memory would wait for it.
        firsts = [batch.item_ids.new_full((), first) for first in self.firsts]
        of_events, of_users = firsts[: self.num_event_features], firsts[self.num_event_features :]
        events, users = batch.event_features, batch.user_features
        return InputRows(
            batch.item_ids,
            batch.item_ids.new_zeros(batch.num_tokens, 0) if events is None else events + torch.stack(of_events),
            batch.item_ids.new_zeros(batch.num_sequences, 0) if users is None else users + torch.stack(of_users),
        )
