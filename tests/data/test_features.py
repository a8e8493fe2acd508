"""Feature columns stay with their events through filters and additions, and are read into batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mme.config import DataConfig
from mme.data.dataset import PreparedDataset
from mme.data.description import read_info
from mme.data.features import Features, Numbers, Vocabulary, bucket_codes, read_vocabularies
from mme.data.loaders import EvaluationLoader, TrainLoader, Worker
from mme.errors import UserError
from mme.files import sha256
from mme.prepare.pipeline import add_events, prepare

ACTIONS = ["view", "cart", "buy", None]
COLUMNS = ["action", "my rating"]


def log(seed: int, rows: int = 400) -> pa.Table:
    """Random events, whose actions and ratings are functions of user, item and time."""
    generator = np.random.default_rng(seed)
    user, item = generator.integers(0, 40, rows), generator.integers(100, 130, rows)
    time = generator.integers(0, 300, rows)
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": time,
            "action": [ACTIONS[(u + i + t) % 4] for u, i, t in zip(user, item, time, strict=True)],
            "my rating": [None if t % 7 == 0 else 1 + (i % 9) / 2 for i, t in zip(item, time, strict=True)],
        }
    )


def values_of(user: int, item: int, time: int) -> tuple[str | None, str | None]:
    rating = 1 + (item % 9) / 2
    return ACTIONS[(user + item + time) % 4], None if time % 7 == 0 else f"{rating:g}"


def raw_events(folder: Path) -> dict[int, list[tuple[Any, ...]]]:
    """Raw (item, time, action, rating) by user."""
    info = json.loads((folder / "dataset.json").read_text())
    items = pq.read_table(folder / "items.parquet").sort_by("item_index")["item_id"].to_pylist()
    names = {name: [None, *vocabulary.numbers] for name, vocabulary in read_vocabularies(folder, COLUMNS).items()}
    assert info["features"] == {name: len(values) - 1 for name, values in names.items()}
    found = {}
    for part in info["parts"]:
        for row in pq.read_table(folder / part["file"]).to_pylist():
            actions = [names["action"][number] for number in row["feature_action"]]
            ratings = [names["my rating"][number] for number in row["feature_my rating"]]
            raw = [items[index] for index in row["item_ids"]]
            found[row["user_id"]] = list(zip(raw, row["timestamps"], actions, ratings, strict=True))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    pq.write_table(log(0), folder / "first.parquet")
    pq.write_table(log(1), folder / "second.parquet")
    options: dict[str, Any] = {"feature_columns": COLUMNS, "min_user_events": 8, "min_item_events": 9}
    prepare([folder / "first.parquet", folder / "second.parquet"], "parquet", folder / "whole", **options)
    prepare([folder / "first.parquet"], "parquet", folder / "grown", **options)
    return folder


def test_every_event_keeps_its_values_through_filters_and_additions(folder: Path) -> None:
    before = raw_events(folder / "grown")
    assert json.loads((folder / "grown" / "dataset.json").read_text())["events_dropped"] > 20
    add_events([folder / "second.parquet"], folder / "grown")
    grown, whole = raw_events(folder / "grown"), raw_events(folder / "whole")
    assert grown == whole
    assert sum(map(len, before.values())) < sum(map(len, grown.values()))
    for user, events in whole.items():
        for item, time, *values in events:
            assert tuple(values) == values_of(user, item, time)


def test_new_values_get_the_next_indices(tmp_path: Path) -> None:
    (tmp_path / "first.csv").write_text(
        "user,item,time,mood\n" + "".join(f"1,{i},{i},b\n1,{i},{i},x\n" for i in range(5))
    )
    (tmp_path / "second.csv").write_text("user,item,time,mood\n2,1,1, a\n2,2,2,b \n2,3,3,\n")
    prepare([tmp_path / "first.csv"], "csv", tmp_path / "set", feature_columns=["mood"], min_user_events=1)
    assert list(read_vocabularies(tmp_path / "set", ["mood"])["mood"].numbers) == ["b", "x"]
    add_events([tmp_path / "second.csv"], tmp_path / "set")
    assert list(read_vocabularies(tmp_path / "set", ["mood"])["mood"].numbers) == ["b", "x", "a"]
    info = read_info(tmp_path / "set")
    for name, sums in [*info["files"].items(), *((part["file"], part) for part in info["parts"])]:
        assert sha256(tmp_path / "set" / name) == sums["sha256"]
    assert {"items.parquet", "features.parquet"} <= info["files"].keys() and len(info["parts"]) == 2
    rows = pq.read_table(tmp_path / "set" / "part-00001.parquet").to_pylist()
    assert [row["feature_mood"] for row in rows] == [[3, 1, 0]]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array(["4.0", " 4", "4.5", "", None, "x.0", "-1.00"]), ["4", "4", "4.5", None, None, "x.0", "-1"]),
        (pa.array([4.0, 4.5, float("nan"), None]), ["4", "4.5", None, None]),
        (pa.array([4, None, -1]), ["4", None, "-1"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_values_are_compared_as_texts(column: pa.Array, texts: list[str | None]) -> None:
    vocabulary = Vocabulary()
    numbers = vocabulary.learn(column)
    names = [None, *vocabulary.numbers]
    assert [names[number] for number in numbers] == texts
    assert vocabulary.find(column).tolist() == numbers.tolist()
    assert vocabulary.find(pa.array(["never met"])).tolist() == [0]


def test_batches_carry_the_values_of_the_events_read_and_none_of_the_target(folder: Path) -> None:
    dataset = PreparedDataset.open(folder / "whole")
    features = Features(events=COLUMNS, users=["action", "user_id"])
    names = {name: [None, *v.numbers] for name, v in read_vocabularies(folder / "whole", COLUMNS).items()}
    events = list(raw_events(folder / "whole").values())
    data = DataConfig(protocol="leave_one_out", max_seq_len=6, batch_size=7, eval_batch_size=7)
    worker = Worker(0, 1, torch.device("cpu"))
    train = TrainLoader(dataset, data, worker, features)
    test = EvaluationLoader(dataset, data, "test", worker, features)
    stream = itertools.islice(train.stream(), train.num_batches(0))
    batches = [(batch.sequences, 2) for batch in stream] + [(batch.sequences, 1) for batch in test.batches()]
    assert len(batches) > 6
    for batch, targets_left in batches:
        assert batch.event_features is not None and batch.user_features is not None
        assert batch.event_features.shape == (batch.num_tokens, 2)
        for sequence, row in enumerate(batch.user_rows.tolist()):
            start, end = batch.seq_offsets[sequence : sequence + 2].tolist()
            window = events[row][: len(events[row]) - targets_left][-5:]
            numbers = batch.event_features[start:end].tolist()
            found = [(names["action"][a], names["my rating"][b]) for a, b in numbers]
            assert found == [(action, rating) for _, _, action, rating in window]
            action, user = batch.user_features[sequence].tolist()
            assert names["action"][action] == window[0][2]  # that of the first event read
            assert user == row + 1


def test_a_missing_column_is_named(folder: Path) -> None:
    dataset = PreparedDataset.open(folder / "whole")
    assert dataset.feature_sizes(["action", "user_id"]) == {"action": 4, "user_id": dataset.num_users + 1}
    with pytest.raises(UserError, match=r"no column 'actoin', .* its columns are action, my rating; --feature-columns"):
        dataset.feature_sizes(["actoin"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["nothing"], r"no column 'nothing' \(found: user_id, item_id, "),
        (["tags"], r"first.parquet: column 'tags' holds list<.*>, expected texts, numbers or booleans"),
        (["user_id"], r"--feature-columns user_id: every set has it"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(tmp_path: Path, columns: list[str], message: str) -> None:
    pq.write_table(log(0, 30).append_column("tags", [[["a"]] * 30]), tmp_path / "first.parquet")
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "first.parquet"], "parquet", tmp_path / "set", feature_columns=columns)
    assert not (tmp_path / "set").exists()


def test_an_index_beyond_the_vocabulary_is_found(folder: Path, tmp_path: Path) -> None:
    prepare([folder / "first.parquet"], "parquet", tmp_path / "set", feature_columns=["action"])
    path = tmp_path / "set" / "part-00000.parquet"
    table = pq.read_table(path)
    wrong = [[9] * len(items) for items in table["item_ids"].to_pylist()]
    place = table.column_names.index("feature_action")
    pq.write_table(table.set_column(place, "feature_action", pa.array(wrong)), path)
    info = json.loads((tmp_path / "set" / "dataset.json").read_text())
    info["parts"][0]["sha256"] = sha256(path)
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"part-00000.parquet: row 0: feature_action index 9, expected 0 to 3"):
        PreparedDataset.open(tmp_path / "set")


def test_buckets_of_numbers_have_their_order_and_width() -> None:
    numbers = [-3.0, -2.0, -5e-324, 0.0, 5e-324, 1.0, 1.18, 1.2, 2.0, 1e300, None, float("nan"), float("inf")]
    codes = bucket_codes(pa.array(numbers)).to_pylist()
    assert codes[-3:] == [None] * 3
    assert codes[:10] == sorted(codes[:10])
    assert codes[3:9] == [0, 4, 4300, 4300, 4301, 4304]  # 2 ** 0.25 = 1.189
    assert codes[:2] == [-4306, -4304]
    assert bucket_codes(pa.array([" 1.2 ", "", "2"])).to_pylist() == [4301, None, 4304]
    assert bucket_codes(pa.array([2**62 + 1])).to_pylist() == [4300 + 4 * 62]


def test_a_number_in_an_unknown_bucket_gets_the_nearest_index() -> None:
    prices = Numbers()
    assert prices.learn(pa.array([1.0, 100.0, None, 1.1])).tolist() == [1, 2, 0, 1]
    assert prices.find(pa.array([1.5, 90.0, 1e9, -7.0, None])).tolist() == [1, 2, 2, 1, 0]
    assert Numbers().find(pa.array([1.0])).tolist() == [0]


@pytest.mark.parametrize("values", [["cheap"], [True], [[1.0]]])
def test_a_column_of_numbers_holds_nothing_else(values: list[Any]) -> None:
    with pytest.raises(TypeError, match=r"expected numbers|not a number"):
        Numbers().learn(pa.array(values))


def test_a_prepared_column_of_numbers_keeps_its_kind_when_events_are_added(tmp_path: Path) -> None:
    (tmp_path / "first.csv").write_text("user_id,item_id,timestamp,price\n1,5,1,9.99\n1,6,2,\n1,7,3,12.5\n")
    (tmp_path / "second.csv").write_text("user_id,item_id,timestamp,price\n1,8,4,10.1\n1,5,5,1200\n")
    prepare([tmp_path / "first.csv"], "csv", tmp_path / "set", feature_columns=["price:number"], min_user_events=1)
    info = add_events([tmp_path / "second.csv"], tmp_path / "set")
    found = read_vocabularies(tmp_path / "set", ["price"])["price"]
    assert isinstance(found, Numbers) and len(found.numbers) == info["features"]["price"] == 3
    (row,) = pq.read_table(tmp_path / "set" / info["parts"][0]["file"]).to_pylist()
    assert row["feature_price"] == [1, 0, 2, 1, 3]
    assert found.find(pa.array(["10.0"])).tolist() == [1]


def test_columns_of_a_set_without_kinds_are_categories(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,price\n1,5,1,9.99\n1,6,2,12.5\n")
    prepare([tmp_path / "log.csv"], "csv", tmp_path / "set", feature_columns=["price"], min_user_events=1)
    path = tmp_path / "set" / "features.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["kind"]), path)
    assert read_vocabularies(tmp_path / "set", ["price"])["price"].numbers == {"9.99": 1, "12.5": 2}
