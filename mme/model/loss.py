"""Next-item prediction: sampled softmax with own or shared negatives, or softmax over the whole catalogue.

Position t of a sequence predicts item t + 1 among that item and negatives (`negatives`: uniform, by popularity or in
batch); a negative equal to the target is masked. With n shared negatives each negative logit gets + ln(128 / n), so that
losses compare (the published protocol has 128); with the log-Q correction − ln of how often its item is expected instead.

Scores are those of all views together, or (`loss.views: each`) each view has a softmax over its own cosines, and the loss
is the mean of the M: ranking then adds up M predictors that were each trained to be right alone, an ensemble. With
`both` the loss is the mean of those two.

Legend: B sequences, T tokens, M views, d view width, D = M·d, U distinct items of a batch, n negatives of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import sampled_softmax_loss
from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.model.feature_rows import FeatureRows, InputRows
from mme.model.negatives import NegativeSampler, token_keys
from mme.model.scoring import normalize_views

REFERENCE_NEGATIVES = 128
# Of a catalogue, for each id of a batch: with more, a table of all rows is more work than a sort of the ids.
MOST_ITEMS_AN_ID = 4


@dataclass(frozen=True)
class BatchItems:
    """The distinct rows of the tables that a training step needs, and where each use of them in a part of its batch points.

    Attributes:
        ids: (U,) int64, rising: distinct item indices, then the rows of features. The full softmax has all items.
        inputs: rows in ``ids`` of what the tokens are made of.
        targets: (T,) int64, row of each token's next item.
        negatives: (groups, n) int64, rows of the negatives; None for the full softmax.
        negative_bias: (U,) float32, added to an item's logit as a negative; None: nothing is.
    """

    ids: Tensor
    inputs: InputRows
    targets: Tensor
    negatives: Tensor | None
    negative_bias: Tensor | None = None


class NextItemLoss:
    """Draws the negatives of a batch and computes the loss of each token.

    Args:
        training_counts: see `NegativeSampler`.
        rows: of items and features in the tables; None: there are no features.
    """

    def __init__(
        self, config: Config, num_items: int, training_counts: Tensor | None = None, rows: FeatureRows | None = None
    ) -> None:
        self.loss = config.loss
        self.score_norm = config.model.score_norm
        self.softmax_views = config.loss.softmax_views(config.model.num_tables)
        self.backend = config.kernels.backend
        self.num_items = num_items
        self.rows = rows or FeatureRows(config.model, num_items, {})
        self.sampler = NegativeSampler(self.loss, num_items, training_counts)
        scaled = self.loss.negatives == "shared" and not self.loss.log_q_correction
        self.logit_offset = math.log(REFERENCE_NEGATIVES / self.loss.num_negatives) if scaled else 0.0

    def items_of(self, parts: list[SequenceBatch], seed: int) -> list[BatchItems]:
        """The items of each part of a batch and of its negatives, which follow from ``seed``; the parts share their ``ids``.

        A token's own negatives are the same in whatever batch and part it stands.
        """
        # Those trained on, each once an epoch: windows overlap.
        batch_targets = torch.cat(
            [part.target_ids if part.trained is None else part.target_ids[part.trained] for part in parts]
        )
        uses: list[Tensor] = []
        for part in parts:
            if self.loss.is_full_softmax:
                candidates = torch.arange(self.num_items, device=batch_targets.device)
            else:
                groups = torch.arange(self.loss.num_groups(part.num_tokens), device=part.item_ids.device)
                first_tokens = groups * self.loss.group_size
                candidates = self.sampler.draw(token_keys(part, first_tokens, seed), batch_targets)
            uses += [*self.rows.inputs_of(part), part.target_ids, candidates]
        ids, rows = compact(uses, self.rows.num_rows)
        bias = None
        if self.loss.log_q_correction:  # rows of features are never negatives
            bias = self.sampler.negative_log_counts(ids.clamp(max=self.num_items - 1))
        items = []
        for start in range(0, len(rows), 5):
            *inputs, targets, negatives = rows[start : start + 5]
            items.append(
                BatchItems(ids, InputRows(*inputs), targets, None if self.loss.is_full_softmax else negatives, bias)
            )
        return items

    def __call__(self, hidden: Tensor, item_rows: Tensor, items: BatchItems) -> Tensor:
        """
        Args:
            hidden: (T, M, d) final views of each token; products are of its dtype.
            item_rows: (U, M, d) the rows of ``items.ids`` in the M tables.

        Returns:
            (T,) float32, −log of the softmax at each token's target, the mean where a token has several.
        """
        losses = []
        for width in self.softmax_views:
            parts = zip(hidden.split(width, 1), item_rows.split(width, 1), strict=True)
            losses.append(torch.stack([self._of_views(*part, items) for part in parts]).mean(0))
        return torch.stack(losses).mean(0)

    def _of_views(self, hidden: Tensor, item_rows: Tensor, items: BatchItems) -> Tensor:
        """The loss (T,) by the scores of some of the views alone, given as all are to `__call__`."""
        queries = normalize_views(hidden.float(), self.score_norm).to(hidden.dtype)
        vectors = normalize_views(item_rows, self.score_norm).to(hidden.dtype)
        if items.negatives is None:
            return self._full_softmax(queries, vectors[: self.num_items], items.targets)
        return sampled_softmax_loss(
            queries,
            vectors,
            items.targets,
            items.negatives,
            group_size=self.loss.group_size,
            temperature=self.loss.temperature,
            logit_offset=self.logit_offset,
            item_bias=items.negative_bias,
            backend=self.backend,
        )

    def _full_softmax(self, queries: Tensor, vectors: Tensor, targets: Tensor) -> Tensor:
        def of_chunk(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
            logits = (chunk @ vectors.T).float() / self.loss.temperature
            return F.cross_entropy(logits, chunk_targets, reduction="none")

        size = self.loss.FULL_SOFTMAX_TOKENS
        chunks = zip(queries.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def compact(groups: Sequence[Tensor], num_rows: int) -> tuple[Tensor, list[Tensor]]:
    """Distinct ids of several index tensors, rising, and the tensors rewritten as rows of them.

    [[7, 3], [3, 9]] → ids [3, 7, 9], [[1, 0], [0, 2]]. By a table of all items or by sorting the ids, whichever is less
    work: at a catalogue as large as the ids a table takes half the time of a sort, at 32 times theirs six times as long.
    """
    flat = torch.cat([group.flatten() for group in groups])
    if num_rows > MOST_ITEMS_AN_ID * flat.numel():
        ids, rows = torch.unique(flat, return_inverse=True)
    else:
        present = torch.zeros(num_rows, dtype=torch.bool, device=flat.device)
        present[flat] = True
        ids = present.nonzero().squeeze(1)
        row_of = torch.empty(num_rows, dtype=torch.int64, device=flat.device)
        row_of[ids] = torch.arange(ids.numel(), device=flat.device)
        rows = row_of.index_select(0, flat)
    sizes = [group.numel() for group in groups]
    return ids, [part.view(group.shape) for part, group in zip(rows.split(sizes), groups, strict=True)]
