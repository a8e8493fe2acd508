"""Next-item prediction: sampled softmax with own or shared negatives, or softmax over the whole catalogue.

Position t of a sequence predicts item t + 1 among that item and negatives (`negatives`: uniform, by popularity or in
batch); a negative equal to the target is masked. With n shared negatives each negative logit gets + ln(128 / n), so that
losses compare (the published protocol has 128); with the log-Q correction − ln of how often its item is expected instead.

Legend: B sequences, T tokens, M views, d view width, D = M·d, U distinct items of a batch, n negatives of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import sampled_softmax_loss
from mme.config import Config
from mme.data.batch import SequenceBatch
from mme.model.negatives import NegativeSampler, token_keys
from mme.model.scoring import normalize_views

REFERENCE_NEGATIVES = 128
FULL_SOFTMAX_TOKENS = 1024  # tokens whose logits over the catalogue exist at once
MOST_ITEMS_AN_ID = (
    4  # of a catalogue, for each id of a batch, at which a table of it is less work than a sort of the ids
)


@dataclass(frozen=True)
class BatchItems:
    """The distinct items that a training step needs, and where each use of them in a part of its batch points.

    Attributes:
        ids: (U,) int64, distinct item indices, rising.
        inputs: (T,) int64, row in ``ids`` of each token's item.
        targets: (T,) int64, row of each token's next item.
        negatives: (groups, n) int64, rows of the negatives; None for the full softmax.
        negative_bias: (U,) float32, added to an item's logit as a negative; None: nothing is.
    """

    ids: Tensor
    inputs: Tensor
    targets: Tensor
    negatives: Tensor | None
    negative_bias: Tensor | None = None


class NextItemLoss:
    """Draws the negatives of a batch and computes the loss of each token; ``training_counts``: see `NegativeSampler`."""

    def __init__(self, config: Config, num_items: int, training_counts: Tensor | None = None) -> None:
        self.loss = config.loss
        self.score_norm = config.model.score_norm
        self.backend = config.kernels.backend
        self.num_items = num_items
        shared = self.loss.negatives == "shared"
        self.group_size = self.loss.negative_group_size if shared else 1
        self.sampler = NegativeSampler(self.loss, num_items, training_counts)
        scaled = shared and not self.loss.log_q_correction
        self.logit_offset = math.log(REFERENCE_NEGATIVES / self.loss.num_negatives) if scaled else 0.0

    def items_of(self, parts: list[SequenceBatch], seed: int) -> list[BatchItems]:
        """The items of each part of a batch and of its negatives, which follow from ``seed``; the parts share their ``ids``.

        A token's own negatives are the same in whatever batch and part it stands.
        """
        if self.loss.kind == "full_softmax":
            ids = torch.arange(self.num_items, device=parts[0].item_ids.device)
            return [BatchItems(ids, part.item_ids, part.target_ids, None) for part in parts]
        batch_targets = torch.cat([part.target_ids for part in parts])
        uses = []
        for part in parts:
            groups = math.ceil(part.num_tokens / self.group_size) if self.group_size else min(1, part.num_tokens)
            first_tokens = torch.arange(groups, device=part.item_ids.device) * self.group_size
            negatives = self.sampler.draw(token_keys(part, first_tokens, seed), batch_targets)
            uses += [part.item_ids, part.target_ids, negatives]
        ids, rows = compact(uses, self.num_items)
        bias = self.sampler.negative_log_counts(ids) if self.loss.log_q_correction else None
        by_part = zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        return [BatchItems(ids, inputs, targets, negatives, bias) for inputs, targets, negatives in by_part]

    def __call__(self, hidden: Tensor, item_rows: Tensor, items: BatchItems) -> Tensor:
        """
        Args:
            hidden: (T, M, d) final views of each token; products are of its dtype.
            item_rows: (U, M, d) the rows of ``items.ids`` in the M tables.

        Returns:
            (T,) float32, −log of the softmax at each token's target.
        """
        queries = normalize_views(hidden.float(), self.score_norm).to(hidden.dtype)
        vectors = normalize_views(item_rows, self.score_norm).to(hidden.dtype)
        if items.negatives is None:
            return self._full_softmax(queries, vectors, items.targets)
        return sampled_softmax_loss(
            queries,
            vectors,
            items.targets,
            items.negatives,
            group_size=self.group_size,
            temperature=self.loss.temperature,
            logit_offset=self.logit_offset,
            item_bias=items.negative_bias,
            backend=self.backend,
        )

    def _full_softmax(self, queries: Tensor, vectors: Tensor, targets: Tensor) -> Tensor:
        def of_chunk(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
            logits = (chunk @ vectors.T).float() / self.loss.temperature
            return F.cross_entropy(logits, chunk_targets, reduction="none")

        chunks = zip(queries.split(FULL_SOFTMAX_TOKENS), targets.split(FULL_SOFTMAX_TOKENS), strict=True)
        return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def compact(groups: list[Tensor], num_items: int) -> tuple[Tensor, list[Tensor]]:
    """Distinct ids of several index tensors, rising, and the tensors rewritten as rows of them.

    [[7, 3], [3, 9]] → ids [3, 7, 9], [[1, 0], [0, 2]]. By a table of all items or by sorting the ids, whichever is less
    work: at a catalogue as large as the ids a table takes half the time of a sort, at 32 times theirs six times as long.
    """
    flat = torch.cat([group.flatten() for group in groups])
    if num_items > MOST_ITEMS_AN_ID * flat.numel():
        ids, rows = torch.unique(flat, return_inverse=True)
    else:
        present = torch.zeros(num_items, dtype=torch.bool, device=flat.device)
        present[flat] = True
        ids = present.nonzero().squeeze(1)
        row_of = torch.empty(num_items, dtype=torch.int64, device=flat.device)
        row_of[ids] = torch.arange(ids.numel(), device=flat.device)
        rows = row_of.index_select(0, flat)
    sizes = [group.numel() for group in groups]
    return ids, [part.view(group.shape) for part, group in zip(rows.split(sizes), groups, strict=True)]
