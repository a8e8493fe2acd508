"""The losses compared with their definition, with negatives and items as in a training step."""

from __future__ import annotations

import math

import pytest
import torch

from mme.config import load_config
from mme.data.batch import SequenceBatch
from mme.errors import UserError
from mme.model.batch_items import BatchItemSampler
from mme.model.feature_rows import FeatureRows
from mme.model.loss import NextItemLoss
from mme.model.scoring import normalize_views

NUM_ITEMS, VIEWS, DIM = 30, 2, 4


def batch_of(num_tokens: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(1)
    return SequenceBatch(
        item_ids=torch.randint(NUM_ITEMS, (num_tokens,), generator=generator),
        seq_offsets=torch.tensor([0, num_tokens]),
        timestamps=torch.arange(num_tokens + 1),
        target_ids=torch.randint(NUM_ITEMS, (num_tokens,), generator=generator),
        user_rows=torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("score_norm", "views"),
    [("concat", "together"), ("per_view", "together"), ("per_view", "each"), ("concat", "both")],
)
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (["loss.negatives=per_token"], list(range(7))),
        (["loss.negatives=shared", "loss.negative_group_size=3"], [0, 0, 0, 1, 1, 1, 2]),
        (["loss.negatives=shared", "loss.negative_group_size=0"], [0] * 7),
        (["loss.kind=full_softmax"], None),
    ],
)
def test_loss_is_the_softmax_over_target_and_negatives(
    options: list[str], groups: list[int] | None, score_norm: str, views: str
) -> None:
    model = [f"model.num_tables={VIEWS}", f"model.embedding_dim={VIEWS * DIM}", f"model.score_norm={score_norm}"]
    model.append(f"loss.views={views}")
    config = load_config(None, ["data.path=unused", "loss.num_negatives=50", *model, *options])
    loss, batch = NextItemLoss(config, NUM_ITEMS), batch_of(7)
    (items,) = BatchItemSampler(config.loss, FeatureRows(config.model, NUM_ITEMS, {}))([batch], 3)
    tables = torch.randn(NUM_ITEMS, VIEWS, DIM)
    hidden = torch.randn(7, VIEWS, DIM)
    found = loss(hidden, tables[items.ids], items)

    # The views of each softmax, and its share of the loss.
    all_views, one_view = [slice(0, VIEWS)], [slice(m, m + 1) for m in range(VIEWS)]
    apart = {"together": all_views, "each": one_view, "both": all_views + one_view}[views]
    shares = {"together": [1.0], "each": [0.5, 0.5], "both": [0.5, 0.25, 0.25]}[views]
    assert torch.equal(items.ids[items.inputs.items], batch.item_ids)
    for token in range(7):
        target = int(batch.target_ids[token])
        if groups is None:
            candidates = [item for item in range(NUM_ITEMS) if item != target]
            offset = 0.0
        else:
            assert items.negatives is not None
            drawn = items.ids[items.negatives[groups[token]]].tolist()
            assert len(drawn) == 50
            candidates = [item for item in drawn if item != target]
            offset = math.log(128 / 50) if len(set(groups)) < 7 else 0.0
        expected = 0.0
        for some, share in zip(apart, shares, strict=True):
            vectors, states = normalize_views(tables[:, some], score_norm), normalize_views(hidden[:, some], score_norm)
            logits = vectors[[target, *candidates]] @ states[token] / 0.05
            logits[1:] += offset
            expected -= share * torch.log_softmax(logits, 0)[0].item()
        assert found[token].item() == pytest.approx(expected, abs=1e-4)


def test_separate_views_need_per_view_scores() -> None:
    with pytest.raises(UserError, match=r"loss\.views=each .* set model\.score_norm=per_view"):
        load_config(None, ["data.path=unused", "loss.views=each"])


def test_views_count_equally_in_per_view_scores() -> None:
    hidden, item = torch.randn(VIEWS, DIM), torch.randn(VIEWS, DIM)
    cosines = torch.cosine_similarity(hidden, item, dim=-1)
    assert (normalize_views(hidden, "per_view") @ normalize_views(item, "per_view")).item() == pytest.approx(
        cosines.mean().item(), abs=1e-6
    )
