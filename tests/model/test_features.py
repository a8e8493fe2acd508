"""The effects of event and user features on a decoder's input and output."""

from __future__ import annotations

import pytest
import torch

from mme.config import load_config
from mme.data.batch import SequenceBatch
from mme.errors import UserError
from mme.model.batch_items import BatchItemSampler
from mme.model.decoder import Decoder
from mme.model.feature_rows import FeatureRows
from mme.model.inputs import UserTokens
from mme.model.loss import NextItemLoss
from tests.model.test_decoder import NUM_ITEMS, decoder, inputs

NUM_ROWS = NUM_ITEMS  # `inputs` picks rows at random, so features may share rows with items


@pytest.mark.parametrize("block", ["fuxi", "hstu", "sasrec"])
def test_only_its_sequence_sees_a_users_token(block: str) -> None:
    model = decoder("model.num_tables=2", "model.moe.num_experts=0", f"model.block={block}")
    rows, index, offsets, times = inputs([4, 0, 8], 2)
    users = torch.tensor([[0], [1], [2]])
    hidden = model(rows, index, offsets, times, user_index=users).hidden
    assert hidden.shape == (12, 2, 8)
    other = model(rows, index, offsets, times, user_index=torch.tensor([[3], [1], [2]])).hidden
    assert (other[:4] - hidden[:4]).abs().amax((1, 2)).min() > 1e-6
    torch.testing.assert_close(other[4:], hidden[4:], rtol=0, atol=0)


def test_a_users_token_acts_like_an_item_before_the_first() -> None:
    """With the user's row as the first item and its time twice, an ordinary sequence computes the same."""
    model = decoder("model.num_tables=2", "model.moe.num_experts=4")
    rows, index, offsets, times = inputs([8], 2)
    output = model(rows, index, offsets, times, user_index=torch.tensor([[5]]))
    longer = model(
        rows,
        torch.cat([torch.tensor([5]), index]),
        torch.tensor([0, 9]),
        torch.cat([times[:1], times]),
    )
    torch.testing.assert_close(output.hidden, longer.hidden[1:])
    assert output.item_places is not None and output.item_places.tolist() == list(range(1, 9))
    assert len(output.routing[0].probabilities) == 2 * 9


def test_features_are_added_to_the_item_of_their_event() -> None:
    model = decoder("model.num_tables=2", "model.moe.num_experts=0")
    rows, index, offsets, times = inputs([4, 5], 2)
    events = torch.randint(NUM_ROWS, (9, 2))
    sums = rows[index] + rows[events[:, 0]] + rows[events[:, 1]]
    found = model(rows, index, offsets, times, event_index=events).hidden
    torch.testing.assert_close(found, model(sums, torch.arange(9), offsets, times).hidden)
    changed = events.clone()
    changed[2, 1] = (changed[2, 1] + 1) % NUM_ROWS
    difference = model(rows, index, offsets, times, event_index=changed).hidden - found
    assert difference[:2].abs().max() == 0  # earlier tokens do not change
    assert difference[2:4].abs().amax((1, 2)).min() > 1e-6
    assert difference[4:].abs().max() == 0


def test_no_features_give_the_same_bits() -> None:
    model = decoder("model.num_tables=2", "model.moe.num_experts=4")
    rows, index, offsets, times = inputs([4, 5], 2)
    without = model(rows, index, offsets, times).hidden
    none = torch.zeros(9, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(model(rows, index, offsets, times, *none).hidden, without)


def test_user_tokens_precede_each_sequence() -> None:
    """The worked example of `UserTokens` and of `mme.data.batch`: lengths [2, 0, 3]."""
    times = torch.tensor([10, 11, 12, 20, 30, 31, 32, 33])
    tokens = UserTokens.before(torch.tensor([0, 2, 2, 5]), times, 5)
    assert tokens.seq_offsets.tolist() == [0, 3, 4, 8]
    assert tokens.item_places.tolist() == [1, 2, 5, 6, 7]
    assert tokens.timestamps.tolist() == [10, 10, 11, 12, 20, 20, 30, 30, 31, 32, 33]


def batch() -> SequenceBatch:
    return SequenceBatch(
        item_ids=torch.tensor([3, 1, 3, 0, 2]),
        seq_offsets=torch.tensor([0, 2, 2, 5]),
        timestamps=torch.arange(8),
        target_ids=torch.tensor([1, 4, 0, 2, 1]),
        user_rows=torch.tensor([7, 8, 9]),
        event_features=torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0], [1, 2]]),
        user_features=torch.tensor([[1], [0], [3]]),
    )


@pytest.mark.parametrize("kind", ["sampled_softmax", "full_softmax"])
def test_rows_of_features_follow_the_items(kind: str) -> None:
    options = ["model.event_features=[action,rating]", "model.user_features=[segment]"]
    config = load_config(None, ["data.path=unused", f"loss.kind={kind}", *options])
    rows = FeatureRows(config.model, 10, {"action": 3, "rating": 4, "segment": 5})
    assert rows.num_rows == 22
    parts = batch().split(2)
    for part, items in zip(parts, BatchItemSampler(config.loss, rows)(parts, 3), strict=True):
        assert part.event_features is not None and part.user_features is not None
        assert torch.equal(items.ids[items.inputs.items], part.item_ids)
        assert torch.equal(items.ids[items.inputs.events], part.event_features + torch.tensor([10, 13]))
        assert torch.equal(items.ids[items.inputs.users], part.user_features + 17)
        assert torch.equal(items.ids[items.targets], part.target_ids)
        if items.negatives is not None:
            assert items.ids[items.negatives].max() < 10


def test_the_full_softmax_covers_only_items() -> None:
    options = ["data.path=unused", "loss.kind=full_softmax", "model.num_tables=2", "model.embedding_dim=8"]
    hidden, tables = torch.randn(5, 2, 4), torch.randn(22, 2, 4)
    found = []
    for features in ([], ["model.event_features=[action,rating]", "model.user_features=[segment]"]):
        config = load_config(None, [*options, *features])
        rows = FeatureRows(config.model, 10, {"action": 3, "rating": 4, "segment": 5})
        (items,) = BatchItemSampler(config.loss, rows)([batch()] if features else [plain_batch()], 3)
        found.append(NextItemLoss(config, 10)(hidden, tables[items.ids], items))
    torch.testing.assert_close(found[1], found[0])


def plain_batch() -> SequenceBatch:
    with_features = batch()
    return SequenceBatch(
        with_features.item_ids,
        with_features.seq_offsets,
        with_features.timestamps,
        with_features.target_ids,
        with_features.user_rows,
    )


def test_a_users_token_counts_in_max_seq_len() -> None:
    options = ["data.path=unused", "data.max_seq_len=9", "model.embedding_dim=16"]
    assert load_config(None, options).history_len == 9
    config = load_config(None, [*options, "model.user_features=[user_id]"])
    assert config.history_len == 8
    model = Decoder(config).eval()
    rows, index, offsets, times = inputs([8], 4)
    assert model(rows, index, offsets, times, user_index=torch.tensor([[0]])).hidden.shape == (8, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.event_features=[a,a]"], "model.event_features names a twice"),
        (["model.event_features=[user_id]"], "model.event_features names user_id, which is a feature of users"),
        (["model.user_features=[a]", "data.max_seq_len=1"], r"data.max_seq_len \(1\) must be at least 2"),
    ],
)
def test_invalid_names_are_rejected(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["data.path=unused", *options])


def test_a_value_without_a_row_counts_as_unknown() -> None:
    """A data set that has grown since has values that the model does not know."""
    features = ["model.event_features=[action,rating]", "model.user_features=[user_id]"]
    model = load_config(None, ["data.path=unused", *features]).model
    rows = FeatureRows(model, NUM_ITEMS, {"action": 3, "rating": 5, "user_id": 4})
    batch = SequenceBatch(
        item_ids=torch.tensor([0, 1]),
        seq_offsets=torch.tensor([0, 1, 2]),
        timestamps=torch.arange(4),
        target_ids=torch.tensor([1, 2]),
        user_rows=torch.tensor([2, 3]),
        event_features=torch.tensor([[2, 5], [3, 4]]),
        user_features=torch.tensor([[3], [4]]),
    )
    found = rows.inputs_of(batch)
    assert (found.events - NUM_ITEMS).tolist() == [[2, 3], [0, 7]]
    assert (found.users - NUM_ITEMS).tolist() == [[11], [8]]
