"""Models are evaluated and used on a set that has grown since, over the items that they know."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import mme
from mme.config import load_config, load_run_config
from mme.data.batch import SequenceBatch
from mme.data.dataset import PreparedDataset
from mme.data.layout import ITEMS_FILE
from mme.data.numbering import Extent, Numbering, numbering_sha256
from mme.data.split import Split
from mme.distributed.world import World
from mme.evaluation.evaluate import TargetRanks, load_trained, target_ranks
from mme.evaluation.metrics import UNRANKED
from mme.growth.known import substitutes
from mme.inference.export import export
from mme.inference.model import Knowledge, TrainedModel
from mme.model.decoder import Decoder
from mme.model.feature_rows import FeatureRows
from mme.prepare.pipeline import add_events, prepare
from tests.distributed.processes import run_on
from tests.growth.days import USERS, events_of, first_day, train, write
from tests.trained import mme as command

LATER = {"item_ids": 7 * 29, "timestamps": 200, "action": "action 2"}  # an event that only day 2 has


def test_a_grown_set_begins_with_its_earlier_numbering(tmp_path: Path) -> None:
    data, features = first_day(tmp_path), ["user_id", "action"]
    before = PreparedDataset.open(data)
    lines = [*(7 * (item + 1) for item in range(20)), "action", "action 0", "view", *range(USERS)]
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert before.numbering_sha256(features) == digest
    add_events([write(tmp_path / "day1.csv", events_of(1))], data)
    now = PreparedDataset.open(data)
    assert now.numbering_sha256(features) != digest
    assert numbering_sha256(data, now.info, features, before.extent(features)) == digest
    assert numbering_sha256(data, now.info, features, Extent(100, before.extent(features).feature_sizes)) == ""
    first = Numbering.read(data, now.info, features).first(before.extent(features))
    assert first.item_ids.to_pylist() == lines[:20]
    assert list(first.vocabularies["action"].numbers) == ["action 0", "view"]


def test_a_hash_of_targets_is_not_computed_again(tmp_path: Path) -> None:
    """Training hashes the targets when it starts; in the evaluation, the files may be those of a larger set."""
    data = first_day(tmp_path)
    dataset = PreparedDataset.open(data)
    split = Split("leave_two_out")
    digest = dataset.targets_sha256(split, "test")
    (data / ITEMS_FILE).unlink()
    assert dataset.targets_sha256(split, "test", dataset.num_items) == digest


def known_ranks(world: World, run: str) -> tuple[TargetRanks, str, int]:
    """Ranks of the test targets by the run's model, over what it knows of the set now."""
    config = load_run_config(Path(run))
    dataset, recommender, _ = load_trained(Path(run), None, config, world)
    digest = dataset.targets_sha256(Split.of(config.data), "test", recommender.num_items)
    return target_ranks(recommender, dataset, config, "test"), digest, recommender.num_items


def known_targets(dataset: PreparedDataset, num_items: int) -> list[tuple[int, int]]:
    """User row and last item of those whose last item is known, and some item before it."""
    found = []
    for row, (start, end) in enumerate(itertools.pairwise(dataset.user_offsets)):
        events = dataset.read(np.array([start]), np.array([end - start]))["item"]
        if events[-1] < num_items and (events[:-1] < num_items).any():
            found.append((row, int(events[-1])))
    return found


@pytest.mark.slow
def test_a_set_that_has_grown_is_evaluated_over_the_items_that_the_run_knows(tmp_path: Path) -> None:
    data, run = first_day(tmp_path), tmp_path / "run"
    run_on(1, train, str(data), str(run))
    model = mme.load(run, device="cpu")
    histories = pa.Table.from_pylist(
        [
            {
                "user_id": user,
                "item_ids": [7 * (user % 20 + 1), 7 * ((user + 5) % 20 + 1)],
                "timestamps": [100, 200],
                "action": ["view", "action 0"],
            }
            for user in range(9)
        ]
    )
    expected = model.recommend(histories, k=7)
    add_events([write(tmp_path / "day2.csv", events_of(2))], data)
    dataset = PreparedDataset.open(data)
    targets = known_targets(dataset, model.num_items)
    assert 0 < len(targets) < dataset.num_users and model.num_items < dataset.num_items
    for found, digest, num_items in run_on(2, known_ranks, str(run)):
        assert num_items == model.num_items
        lines = [f"{row}\t{7 * (item + 1)}\n" for row, item in targets]
        assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()
        for ranks in found.by_model.values():
            assert ranks.numel() == len(targets)
            ranked = ranks[ranks != UNRANKED]
            assert ranked.numel() and ranked.min() >= 1 and ranked.max() <= num_items

    again = mme.load(run, device="cpu")
    assert again.item_ids.equals(model.item_ids)
    assert again.recommend(histories, k=7).equals(expected)
    # An event of an item that came later is left out.
    later = pa.Table.from_pylist(
        [{**history, **{key: [*history[key], new] for key, new in LATER.items()}} for history in histories.to_pylist()]
    )
    assert again.recommend(later, k=7).equals(expected)
    export(again, "users", tmp_path / "users.parquet")
    assert len(pq.read_table(tmp_path / "users.parquet")) == dataset.num_users

    pq.write_table(histories, tmp_path / "histories.parquet")
    output = tmp_path / "lists.parquet"
    command("recommend", "--run", run, "--users", tmp_path / "histories.parquet", "--top-k", "7", "--output", output)
    assert pq.read_table(output)["item_ids"].to_pylist() == expected["item_ids"].to_pylist()

    # Other commands say so in one line if nothing is left to do, or if the set was prepared again.
    add_events([write(tmp_path / "day3.csv", [(user, 7_000, 3 * 86_400, "view") for user in range(USERS)])], data)
    refused = command("evaluate", "--run", run, check=False)
    assert refused.returncode == 2
    message = f"{data}: no user has a test target and an earlier event among the {model.num_items} items that "
    assert message in refused.stderr and refused.stderr.count("\n") == 1
    shutil.rmtree(data)
    shutil.copytree(first_day(tmp_path, day=0, first_item=2), data)
    renumbered = f"{data}\n"
    for arguments in (["evaluate"], ["recommend", "--users", tmp_path / "histories.parquet", "--output", output]):
        refused = command(*arguments, "--run", run, check=False)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.endswith(f"indices of items or feature values differ from those of {renumbered}")


def test_a_number_in_a_new_bucket_counts_as_in_a_request(tmp_path: Path) -> None:
    data, options = tmp_path / "set", {"feature_columns": ["price:number", "shop"], "min_user_events": 1}

    def day(number: int, prices: list[float]) -> Path:
        path = tmp_path / f"{number}.csv"
        lines = [
            f"{user},{item},{1000 * number + item},{price},shop {price}"
            for user in (1, 2)
            for item, price in enumerate(prices)
        ]
        path.write_text("\n".join(["user_id,item_id,timestamp,price,shop", *lines]) + "\n")
        return path

    prepare([day(1, [1.0, 10.0, 100.0])], "csv", data, **options)
    config = load_config(None, [f"data.path={data}", "model.event_features=[price,shop]"])
    features = config.model.feature_columns
    known = PreparedDataset.open(data).extent(features)
    numbering = Numbering.read(data, PreparedDataset.open(data).info, features)
    later = [200.0, 5.0, 1.0, 1000.0]
    add_events([day(2, later)], data)
    dataset = PreparedDataset.open(data)
    found = substitutes(known, data, dataset.info, config.model)
    rows = FeatureRows(config.model, known.num_items, known.feature_sizes, found)
    grown = Numbering.read(data, dataset.info, features).vocabularies
    numbers = torch.tensor(
        np.stack([grown["price"].find(pa.array(later)), grown["shop"].find(pa.array([f"shop {p}" for p in later]))], 1)
    )
    batch = SequenceBatch(
        torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]), torch.arange(5), torch.zeros(4), torch.zeros(1)
    )
    events = rows.inputs_of(dataclasses.replace(batch, event_features=numbers.long())).events
    asked = numbering.vocabularies["price"].find(pa.array(later))
    assert (events[:, 0] - rows.firsts[0]).tolist() == asked.tolist() == [3, 2, 1, 3]
    assert (events[:, 1] - rows.firsts[1]).tolist() == [0, 0, 1, 0]  # new shops are unknown


@pytest.mark.parametrize("at_once", [1, 256])
def test_vectors_of_users_with_new_values_are_those_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """With one history at once they pass through the padded encoder, which reads any row that it is given."""
    monkeypatch.setattr("mme.inference.model.HISTORIES_AT_ONCE", at_once)
    columns = ["user_id", "item_id", "timestamp", "price", "shop"]
    days = [
        [(1, 5, 10, 1.0, "a"), (2, 6, 11, 10.0, "b")],
        [(1, 6, 20, 99.0, "c"), (3, 5, 21, 10.0, "d"), (3, 7, 22, 1.0, "a")],
    ]
    for number, events in enumerate(days):
        pq.write_table(
            pa.Table.from_pylist([dict(zip(columns, event, strict=True)) for event in events]),
            tmp_path / f"{number}.parquet",
        )
    data, kept = tmp_path / "set", ["price:number", "shop"]
    prepare([tmp_path / "0.parquet"], "parquet", data, feature_columns=kept, min_user_events=1, min_item_events=1)
    config = load_config(
        None,
        [
            f"data.path={data}",
            "model.event_features=[price,shop]",
            "model.user_features=[user_id]",
            "data.max_seq_len=8",
        ],
    )
    info = PreparedDataset.open(data).info
    numbering = Numbering.read(data, info, config.model.feature_columns)
    rows = FeatureRows(config.model, 2, numbering.feature_sizes()).num_rows
    weights = {f"decoder/{name}": weight.detach() for name, weight in Decoder(config).named_parameters()}
    weights |= {f"tables/item_{m}": torch.randn(rows, config.model.view_dim) for m in range(config.model.num_tables)}
    knowledge = Knowledge(numbering, np.ones(2, np.int64), (10, 11))
    model = TrainedModel(config, knowledge, weights, "model", "cpu")
    add_events([tmp_path / "1.parquet"], data)
    export(model, "users", tmp_path / "users.parquet")
    found = pq.read_table(tmp_path / "users.parquet")
    asked = []
    for user in found["user_id"].to_pylist():
        history = zip(*[event for events in days for event in events if event[0] == user], strict=True)
        _, items, times, prices, shops = map(list, history)
        asked.append({"user_id": user, "item_ids": items, "timestamps": times, "price": prices, "shop": shops})
    expected = model.user_embeddings(pa.Table.from_pylist(asked))
    np.testing.assert_allclose(np.stack(found["vector"].to_numpy()), expected, rtol=1e-5, atol=1e-6)
