"""`mme.load`: lists as `mme recommend`, scores as evaluation, all formats of histories, and rejected input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import mme
from mme.errors import UserError
from mme.evaluation.metrics import rank_metrics
from mme.inference.model import TrainedModel
from tests.trained import Trained, train_small
from tests.trained import mme as command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_small(tmp_path_factory.mktemp("inference"))


@pytest.fixture(scope="module")
def model(trained: Trained) -> TrainedModel:
    return mme.load(trained.run, device="cpu")


def history(model: TrainedModel, *items: int, **more: Any) -> dict[str, Any]:
    ids = model.item_ids.take(pa.array(items)).to_pylist()
    first = model.knowledge.times[0]
    return {"item_ids": ids, "timestamps": [first + 60 * place for place in range(len(ids))], **more}


def test_lists_equal_those_of_mme_recommend(trained: Trained, model: TrainedModel, tmp_path: Path) -> None:
    users = trained.users()
    pq.write_table(users, tmp_path / "users.parquet")
    files = ["--users", tmp_path / "users.parquet", "--output", tmp_path / "lists.parquet"]
    command("recommend", "--run", trained.run, *files, "--top-k", "7")
    expected = pq.read_table(tmp_path / "lists.parquet")
    found = model.recommend(users, k=7)
    assert found["item_ids"].to_pylist() == expected["item_ids"].to_pylist()
    assert found["user_id"].to_pylist() == expected["user_id"].to_pylist()
    scores = [np.asarray(table["scores"].combine_chunks().flatten()) for table in (found, expected)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-6)


def test_scores_give_the_metrics_of_mme_evaluate(trained: Trained, model: TrainedModel, tmp_path: Path) -> None:
    shutil.rmtree(trained.data / ".cache")
    expected = json.loads(command("evaluate", "--run", trained.run, "--cache-dir", tmp_path / "cache").stdout)
    assert len(list((tmp_path / "cache").glob("*.events"))) == 1 and not (trained.data / ".cache").exists()
    rows = [row for row in trained.users().to_pylist() if len(row["item_ids"]) > 2]
    histories = [
        {"item_ids": row["item_ids"][:-1], "timestamps": row["timestamps"][:-1], "request_timestamp": row["timestamps"][-1]}
        for row in rows
    ]  # fmt: skip
    ids = model.item_ids.to_pylist()
    place = {item: index for index, item in enumerate(ids)}
    ranks = []
    for scores, row in zip(model.score(histories, ids), rows, strict=True):
        target, seen = place[row["item_ids"][-1]], {place[item] for item in row["item_ids"][:-1]}
        above = (scores > scores[target]) | ((scores == scores[target]) & (np.arange(len(ids)) < target))
        above[list(seen)] = False
        ranks.append(10**9 if target in seen else 1 + int(above.sum()))
    found = rank_metrics(torch.tensor(ranks))
    assert expected["users"] == len(ranks)
    for name in ("hr@10", "ndcg@10", "hr@50", "ndcg@50"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name


def test_a_data_set_that_is_damaged_or_linked_is_refused(trained: Trained, tmp_path: Path) -> None:
    items, kept = trained.data / "items.parquet", tmp_path / "items.parquet"
    shutil.copy(items, kept)
    try:
        items.unlink()
        items.symlink_to(kept)
        with pytest.raises(UserError, match=r"items\.parquet: a symbolic link, which is not followed here"):
            mme.load(trained.run)
        items.unlink()
        table = pq.read_table(kept)
        pq.write_table(table.slice(1), items)
        with pytest.raises(UserError, match=r"items\.parquet: damaged: its SHA-256"):
            mme.load(trained.run)
    finally:
        shutil.copy(kept, tmp_path / "copy")
        (tmp_path / "copy").replace(items)


def test_embeddings_multiply_to_scores(model: TrainedModel) -> None:
    histories = [history(model, 3, 5, 7), history(model, 1)]
    users, items = model.user_embeddings(histories), model.item_embeddings()
    assert users.dtype == items.dtype == np.float32
    assert users.shape == (2, 16) and items.shape == (60, 16)
    ids = model.item_ids.to_pylist()[10:20]
    np.testing.assert_allclose(model.score(histories, ids), users @ items[10:20].T, atol=1e-6)
    np.testing.assert_array_equal(model.item_embeddings(ids[::-1]), items[10:20][::-1])
    expected = items.copy()
    items[:] = 0  # the caller's own
    np.testing.assert_array_equal(model.item_embeddings(), expected)


def test_all_formats_of_histories_give_the_same_lists(model: TrainedModel) -> None:
    import pandas
    import polars

    rows = [history(model, 3, 5, 7, user_id=11), history(model, 1, user_id=12)]
    table = pa.Table.from_pylist(rows)
    expected = model.recommend(rows, k=5).to_pylist()
    assert expected[0]["user_id"] == 11
    for given in (table, pandas.DataFrame(rows), polars.DataFrame(rows), tuple(rows)):
        assert model.recommend(given, k=5).to_pylist() == expected
    assert "user_id" not in model.recommend([history(model, 3)]).column_names


def test_a_history_without_request_time_is_asked_for_at_its_last_event(model: TrainedModel) -> None:
    import pandas

    first, second = history(model, 3, 5, 7), history(model, 1, 2)
    later = {**second, "request_timestamp": second["timestamps"][-1] + 40 * 86_400}
    expected = np.concatenate([model.user_embeddings([first]), model.user_embeddings([later])])
    assert np.abs(expected[1] - model.user_embeddings([second])[0]).max() > 1e-3  # the time matters
    for given in ([first, later], pandas.DataFrame([first, later])):
        np.testing.assert_allclose(model.user_embeddings(given), expected, atol=1e-6)


def test_seen_blocked_and_candidates(model: TrainedModel) -> None:
    ids = model.item_ids.to_pylist()
    rows = [history(model, 3, 5, 7), history(model, 1, 2)]
    full = model.recommend(rows, k=60)["item_ids"].to_pylist()
    assert not {ids[3], ids[5], ids[7]} & set(full[0]) and len(full[0]) == 57
    with_seen = model.recommend(rows, k=60, exclude_seen=False)["item_ids"].to_pylist()
    assert sorted(with_seen[0]) == ids and [item for item in with_seen[0] if item in full[0]] == full[0]
    few = [ids[1], ids[20], ids[3], ids[40], 999_999]
    chosen = model.recommend(rows, k=4, candidates=few)["item_ids"].to_pylist()
    assert chosen == [[item for item in each if item in few] for each in full]
    blocked = model.recommend(rows, k=3, blocked=full[0][:2])["item_ids"].to_pylist()
    assert blocked[0] == full[0][2:5]
    assert model.recommend(rows, candidates=[])["item_ids"].to_pylist() == [[], []]


def test_unknown_items_are_left_out_or_refused(model: TrainedModel) -> None:
    known, ids = history(model, 3, 5), model.item_ids.to_pylist()
    mixed = {**known, "item_ids": [known["item_ids"][0], -1, known["item_ids"][1]]}
    mixed["timestamps"] = [known["timestamps"][0], *known["timestamps"]]
    assert model.recommend([mixed])["item_ids"] == model.recommend([known])["item_ids"]
    with pytest.raises(UserError, match=r"row 0: item -1 is unknown"):
        model.recommend([mixed], unknown="refuse")
    stranger = {"item_ids": [-1], "timestamps": [model.knowledge.times[0]]}
    popular = np.argsort(-model.knowledge.counts, kind="stable")
    (found,) = model.recommend([stranger], k=3, blocked=[ids[popular[0]]]).to_pylist()
    assert found["fallback"] and found["item_ids"] == [ids[place] for place in popular[1:4]]
    with pytest.raises(UserError, match="row 0: has no known item"):
        model.user_embeddings([stranger])


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([], "no rows"),
        ("runs/x", "str, expected a pyarrow Table"),
        ([3], "a list of int, expected dicts"),
        ([{"item_ids": [1]}], r"no column 'timestamps' \(found: "),
        ([{"item_ids": [1000], "timestamps": [1, 2]}], "row 0: 1 item_ids and 2 timestamps"),
        ([{"item_ids": [], "timestamps": []}], "row 0: no item_ids"),
        ([{"item_ids": [1000, "a"], "timestamps": [1, 2]}], "histories: "),
        ([{"item_ids": [1000, 1001], "timestamps": [1_700_000_000, 1_600_000_000]}], "row 0: timestamp 1600000000 follows"),
        ([{"item_ids": [1000], "timestamps": [1_700_050_000_000]}], "it looks like milliseconds"),
    ],
)  # fmt: skip
def test_wrong_histories_are_refused_with_their_row(model: TrainedModel, histories: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model.recommend(histories)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused(model: TrainedModel, tmp_path: Path) -> None:
    rows = [history(model, 3)]
    for call, message in [
        (lambda: model.recommend(rows, k=0), r"k \(0\) must be at least 1"),
        (lambda: model.recommend(rows, unknown="drop"), r"unknown \('drop'\) must be"),
        (lambda: model.item_embeddings([-5]), "item -5 is unknown"),
        (lambda: model.score(rows, ["x"]), "ids: expected raw item ids"),
        (lambda: mme.load(tmp_path / "none"), "no such run or export"),
        (lambda: mme.load(tmp_path), "no such configuration file"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
