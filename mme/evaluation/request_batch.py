"""Checked histories as a batch for the model.

Legend: B histories, n their events.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mme.config import Config, ModelConfig
from mme.data.batch import SequenceBatch
from mme.data.parts import IntArray
from mme.data.ranges import concatenated
from mme.evaluation.requests import Requests


def sequence_batch(requests: Requests, rows: IntArray, config: Config) -> tuple[SequenceBatch, Tensor, Tensor]:
    """The newest window of each history in ``rows``, and the items of the whole histories with their offsets."""
    model: ModelConfig = config.model
    starts, ends = requests.offsets[rows], requests.offsets[rows + 1]
    firsts = np.maximum(starts, ends - config.history_len)
    window = concatenated(firsts, ends - firsts)
    seq_offsets = np.concatenate([[0], np.cumsum(ends - firsts)])
    times = np.insert(requests.times[window], seq_offsets[1:], requests.request_times[rows])
    of_users = [
        requests.of_users[name][rows] if name in requests.of_users else requests.of_events[name][firsts]
        for name in model.user_features
    ]
    items = torch.from_numpy(requests.items[window])
    batch = SequenceBatch(
        item_ids=items,
        seq_offsets=torch.from_numpy(seq_offsets),
        timestamps=torch.from_numpy(times),
        target_ids=torch.zeros_like(items),  # only the next item is predicted
        user_rows=torch.from_numpy(rows),
        event_features=_side_by_side([requests.of_events[name][window] for name in model.event_features]),
        user_features=_side_by_side(of_users),
    )
    seen = torch.from_numpy(requests.items[concatenated(starts, ends - starts)])
    return batch, seen, torch.from_numpy(np.concatenate([[0], np.cumsum(ends - starts)]))


def _side_by_side(columns: list[IntArray]) -> Tensor | None:
    return torch.from_numpy(np.stack(columns, axis=1)) if columns else None
