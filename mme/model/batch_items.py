"""The rows of the tables that a training batch needs: its inputs, its targets and the negatives sampled for it.

Legend: B sequences, T tokens, U distinct rows of a batch, n negatives of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mme.config import LossConfig
from mme.data.batch import SequenceBatch
from mme.model.feature_rows import FeatureRows, InputRows
from mme.model.negatives import NegativeSampler, token_keys

# Above this many catalogue items per id of a batch, sorting the ids is less work than marking them in an array of all items.
MOST_ITEMS_AN_ID = 4


@dataclass(frozen=True)
class BatchItems:
    """The distinct table rows that a training step needs, and the positions at which one part of its batch uses them.

    Attributes:
        ids: (U,) int64, ascending: distinct item indices, then feature rows. With the full softmax, all items.
        inputs: positions in ``ids`` of the tokens' items and features.
        targets: (T,) int64, position of each token's next item.
        negatives: (groups, n) int64, positions of the negatives; None for the full softmax.
        negative_bias: (U,) float32, added to the logit of an item that is a negative; None: nothing is added.
    """

    ids: Tensor
    inputs: InputRows
    targets: Tensor
    negatives: Tensor | None
    negative_bias: Tensor | None = None


class BatchItemSampler:
    """Samples the negatives of a batch and finds the distinct rows that the batch needs.

    Args:
        rows: items and features in the tables.
        training_counts: see `NegativeSampler`.
    """

    def __init__(self, loss: LossConfig, rows: FeatureRows, training_counts: Tensor | None = None) -> None:
        self.loss, self.rows = loss, rows
        self.negatives = NegativeSampler(loss, rows.num_items, training_counts)

    def __call__(self, parts: list[SequenceBatch], seed: int, batch_targets: Tensor | None = None) -> list[BatchItems]:
        """One `BatchItems` for each part of a batch; all share their ``ids``.

        Negatives depend on ``seed``. Per-token negatives do not depend on the batch or part of the token.

        Args:
            batch_targets: (n,) int64, the trained targets of the global batch, from which in-batch negatives are sampled;
                None: the parts are the whole batch.
        """
        if batch_targets is None:
            batch_targets = torch.cat([part.trained_targets for part in parts])
        groups: list[Tensor] = []
        for part in parts:
            groups += [*self.rows.inputs_of(part), part.target_ids, self._candidates(part, batch_targets, seed)]
        ids, positions = distinct_ids(groups, self.rows.num_rows)
        bias = None
        if self.loss.log_q_correction:  # feature rows are never negatives
            bias = self.negatives.negative_log_counts(ids.clamp(max=self.rows.num_items - 1))
        items = []
        for start in range(0, len(positions), 5):
            *inputs, targets, negatives = positions[start : start + 5]
            items.append(
                BatchItems(ids, InputRows(*inputs), targets, None if self.loss.is_full_softmax else negatives, bias)
            )
        return items

    def _candidates(self, part: SequenceBatch, batch_targets: Tensor, seed: int) -> Tensor:
        """(groups, n) int64 negatives of each group of tokens, or (items,) all items for the full softmax."""
        device = batch_targets.device
        if self.loss.is_full_softmax:
            return torch.arange(self.rows.num_items, device=device)
        first_tokens = torch.arange(self.loss.num_groups(part.num_tokens), device=device) * self.loss.group_size
        return self.negatives.draw(token_keys(part, first_tokens, seed), batch_targets)


def distinct_ids(groups: Sequence[Tensor], num_rows: int) -> tuple[Tensor, list[Tensor]]:
    """The distinct ids of several index tensors, ascending, and the tensors rewritten as positions in them.

    [[7, 3], [3, 9]] → ids [3, 7, 9], positions [[1, 0], [0, 2]]. Marking the ids in an array of all rows takes half as long
    as sorting them where the catalogue is as large as the number of ids, and six times as long where it is 32 times larger.
    """
    flat = torch.cat([group.flatten() for group in groups])
    if num_rows > MOST_ITEMS_AN_ID * flat.numel():
        ids, positions = torch.unique(flat, return_inverse=True)
    else:
        present = torch.zeros(num_rows, dtype=torch.bool, device=flat.device)
        present[flat] = True
        ids = present.nonzero().squeeze(1)
        position_of = torch.empty(num_rows, dtype=torch.int64, device=flat.device)
        position_of[ids] = torch.arange(ids.numel(), device=flat.device)
        positions = position_of.index_select(0, flat)
    sizes = [group.numel() for group in groups]
    return ids, [part.view(group.shape) for part, group in zip(positions.split(sizes), groups, strict=True)]
