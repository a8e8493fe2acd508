"""Next-item prediction: softmax over each token's target and its negatives, or over the whole catalogue.

Position t of a sequence predicts item t + 1. A negative equal to the target is masked. With n shared negatives,
ln(128 / n) is added to each negative's logit, which makes losses comparable with those of 128 negatives, the number in the
published protocol. The log-Q correction instead adds −ln of the item's expected count among the negatives.

Scores sum over all views. With `loss.views: each`, each view has a softmax over its own cosines and the loss is the mean of
the M losses; ranking then sums M separately trained predictors, an ensemble. With `both` the loss is the mean of these two.

Legend: T tokens, M views, d view width, D = M·d, U distinct rows of a batch, n negatives of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import sampled_softmax_loss
from mme.config import Config
from mme.model.batch_items import BatchItems
from mme.model.scoring import normalize_views

REFERENCE_NEGATIVES = 128


class NextItemLoss:
    """Computes the loss of each token."""

    def __init__(self, config: Config, num_items: int) -> None:
        self.loss = config.loss
        self.score_norm = config.model.score_norm
        self.softmax_views = config.loss.softmax_views(config.model.num_tables)
        self.backend = config.kernels.backend
        self.num_items = num_items
        scaled = self.loss.negatives == "shared" and not self.loss.log_q_correction
        self.logit_offset = math.log(REFERENCE_NEGATIVES / self.loss.num_negatives) if scaled else 0.0

    def __call__(self, hidden: Tensor, item_rows: Tensor, items: BatchItems) -> Tensor:
        """
        Args:
            hidden: (T, M, d) final views of each token; products are computed in its dtype.
            item_rows: (U, M, d) the rows of ``items.ids`` in the M tables.

        Returns:
            (T,) float32, −log softmax at each token's target; with several softmaxes, their mean.
        """
        losses = []
        for width in self.softmax_views:
            parts = zip(hidden.split(width, 1), item_rows.split(width, 1), strict=True)
            losses.append(torch.stack([self._of_views(*part, items) for part in parts]).mean(0))
        return torch.stack(losses).mean(0)

    def _of_views(self, hidden: Tensor, item_rows: Tensor, items: BatchItems) -> Tensor:
        """(T,) the loss with the summed scores of the given views, which are all M or some of them."""
        queries = normalize_views(hidden.float(), self.score_norm).to(hidden.dtype)
        vectors = normalize_views(item_rows, self.score_norm).to(hidden.dtype)
        return LOSSES[self.loss.kind](self, queries, vectors, items)

    def sampled_softmax(self, queries: Tensor, vectors: Tensor, items: BatchItems) -> Tensor:
        """Softmax over each token's target and its negatives."""
        assert items.negatives is not None
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

    def full_softmax(self, queries: Tensor, vectors: Tensor, items: BatchItems) -> Tensor:
        """Softmax over the whole catalogue, in chunks of tokens whose logits backward recomputes."""
        catalogue = vectors[: self.num_items]  # without the features, which follow the items

        def of_chunk(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
            logits = (chunk @ catalogue.T).float() / self.loss.temperature
            return F.cross_entropy(logits, chunk_targets, reduction="none")

        size = self.loss.FULL_SOFTMAX_TOKENS
        chunks = zip(queries.split(size), items.targets.split(size), strict=True)
        return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


# Losses by `loss.kind`: normalised queries (T, D) and vectors (U, D) → (T,) float32. To add one, write its method, add an
# entry here, and add its name to `mme.config.schema`.
LOSSES: dict[str, Callable[[NextItemLoss, Tensor, Tensor, BatchItems], Tensor]] = {
    "sampled_softmax": NextItemLoss.sampled_softmax,
    "full_softmax": NextItemLoss.full_softmax,
}
