"""Which events are targets and with which weight, by a feature column of the event to be predicted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mme.config import DataConfig, load_config
from mme.data.dataset import PreparedDataset
from mme.data.features import read_vocabularies
from mme.data.loaders import TrainLoader, Worker
from mme.data.target_weights import TargetWeights, read_target_weights
from mme.errors import UserError
from mme.prepare.pipeline import prepare

ACTIONS = ["view", "click", "buy", ""]
WEIGHT_OF = {"view": 0.0, "click": 0.25, "buy": 2.0, None: 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 users of 5 to 16 events, whose actions and weights are functions of user and place."""
    folder = tmp_path_factory.mktemp("weights")
    rows = [
        f"{user},{user + place},{100 * place},{ACTIONS[user * place % 4]},{place / 4},{place}x\n"
        for user in range(12)
        for place in range(5 + user)
    ]
    (folder / "log.csv").write_text("user,item,time,action,weight,other\n" + "".join(rows))
    columns = ["action", "weight", "other", "time:number"]
    prepare([folder / "log.csv"], "csv", folder / "set", feature_columns=columns)
    return folder / "set"


def weights_of(folder: Path, *overrides: str) -> TargetWeights | None:
    config = load_config(None, ["data.path=unused", *overrides])
    return read_target_weights(folder, PreparedDataset.open(folder).info, config.loss)


def loaded(folder: Path, weights: TargetWeights | None, **options: object) -> dict[int, list[tuple[float, bool]]]:
    """Weight and whether it is trained on, of each token from the oldest, by user row; one window per user."""
    data = DataConfig(protocol="leave_one_out", max_seq_len=30, batch_size=5, **options)  # type: ignore[arg-type]
    loader = TrainLoader(PreparedDataset.open(folder), data, Worker(0, 1, torch.device("cpu")), target_weights=weights)
    found = {}
    for train_batch in itertools.islice(loader.stream(), loader.num_batches(0)):
        for batch in train_batch.sequences.split(2):
            assert batch.target_weights is not None and batch.trained is not None
            pairs = list(zip(batch.target_weights.tolist(), batch.trained.tolist(), strict=True))
            offsets = batch.seq_offsets.tolist()
            for row, (start, end) in zip(batch.user_rows.tolist(), itertools.pairwise(offsets), strict=True):
                found[row] = pairs[start:end]
    return found


def test_the_action_of_the_target_decides(folder: Path) -> None:
    weights = weights_of(folder, "loss.weight_column=action", "loss.target_weights=[buy=2,click=0.25]")
    found = loaded(folder, weights)
    values = [None, *read_vocabularies(folder, ["action"])["action"].numbers]
    actions = pq.read_table(folder / "part-00000.parquet")["feature_action"].to_pylist()
    assert len(found) == 12
    for row, indices in enumerate(actions):
        # The last event is the test target, the first one has nothing before it.
        expected = [WEIGHT_OF[values[index]] for index in indices[1:-1]]
        assert found[row] == [(weight, weight > 0) for weight in expected]


def test_a_column_of_weights(folder: Path) -> None:
    found = loaded(folder, weights_of(folder, "loss.weight_column=weight"))
    assert found[3] == [(place / 4, True) for place in range(1, 7)]


def test_values_are_named_as_in_the_file(folder: Path) -> None:
    found = weights_of(folder, "loss.weight_column=weight", "loss.target_weights=[1.0=2,0.5=1]")
    same = weights_of(folder, "loss.weight_column=weight", "loss.target_weights=[1=2,0.5=1]")
    assert found is not None and same is not None and found.by_value.tolist() == same.by_value.tolist()
    with pytest.raises(UserError, match=r"^loss.target_weights: 1 and 1.0 are the same value of weight$"):
        weights_of(folder, "loss.weight_column=weight", "loss.target_weights=[1=2,1.0=1]")


def test_no_column_gives_no_weights(folder: Path) -> None:
    assert weights_of(folder) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weight_column=mood"], r"loss.weight_column: mood: .* has no such column: its columns are action, weight, other, "),
        (["weight_column=time"], r"loss.weight_column: time: was kept as time:number, in buckets: expected --feature-colu"),
        (["weight_column=other"], r"column 'other' of loss.weight_column has the value '0x': expected a weight from 0, or "),
        (
            ["weight_column=action", "target_weights=[sell=1]"],
            r"loss.target_weights: sell: no event has this action: expected some of view, click, buy",
        ),
        (["weight_column=action", "target_weights=[buy=0]"], r"loss.weight_column: action: all weights are 0"),
        (["target_weights=[buy=1]"], r"loss.target_weights needs loss.weight_column"),
        (["weight_column=action", "target_weights=[buy]"], r"loss.target_weights \(buy\): expected VALUE=WEIGHT"),
        (["weight_column=action", "target_weights=[buy=-1]"], r"expected VALUE=WEIGHT, each value once and each weight a "),
        (["weight_column=action", "target_weights=[buy=nan]"], r"expected VALUE=WEIGHT"),
        (["weight_column=action", "target_weights=[buy=1,buy=2]"], r"expected VALUE=WEIGHT"),
        (["weight_column=action", "sampling=in_batch"], r"loss.weight_column does not go with loss.sampling=in_batch"),
    ],
)  # fmt: skip
def test_wrong_weights_are_named(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights_of(folder, *[f"loss.{override}" for override in overrides])
