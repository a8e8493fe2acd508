"""The embedded data set keeps the promises of its description, and its oracle is as good as stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mme.config import DataConfig
from mme.data.dataset import PreparedDataset
from mme.data.loaders import EvaluationLoader, Worker
from mme.data.split import HeldOut, Split
from mme.distributed.world import World
from mme.errors import UserError
from mme.evaluation.metrics import rank_metrics
from mme.evaluation.popularity import Popularity, popularity_ranks
from mme.prepare.synthetic import prepare_synthetic

HOUR_S = 3600
LEAVE_TWO_OUT = Split("leave_two_out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("set") / "quickstart"
    return folder, prepare_synthetic("quickstart", folder, users=1200, seed=3)


def test_counts_sessions_and_no_repeats(made: tuple[Path, dict[str, Any]]) -> None:
    dataset = PreparedDataset.open(made[0])
    assert (dataset.num_users, dataset.num_items) == (1200, 2000)
    events = dataset.read(np.array([0]), np.array([dataset.num_events]))
    assert 45 <= dataset.num_events / 1200 <= 55
    pairs = np.repeat(np.arange(1200), np.diff(dataset.user_offsets)) * 2000 + events["item"]
    assert np.unique(pairs).size == dataset.num_events
    same_user = np.diff(np.repeat(np.arange(1200), np.diff(dataset.user_offsets))) == 0
    gaps = np.diff(events["timestamp"])[same_user]
    assert not ((gaps > HOUR_S / 2) & (gaps < 2 * HOUR_S)).any()  # either inside a session or between two
    assert 0.1 < (gaps > HOUR_S).mean() < 0.2


def ranks_by_recent_neighbours(dataset: PreparedDataset, keep: str) -> torch.Tensor:
    """Ranks of the test targets by how often items share a session with the items that ``keep`` selects.

    `session`: the user's last events before the target if they are in its session, otherwise the whole history.
    `history`: always the whole history.
    """
    ends = dataset.train_ends(LEAVE_TWO_OUT)
    events = dataset.read(np.array([0]), np.array([dataset.num_events]))
    together = np.zeros((dataset.num_items, dataset.num_items))
    for begin, end in zip(dataset.user_offsets[:-1], ends, strict=True):
        items, times = events["item"][begin:end], events["timestamp"][begin:end]
        session = np.cumsum(np.diff(times, prepend=0) > HOUR_S)
        first, second = np.nonzero(session[:, None] == session)
        np.add.at(together, (items[first], items[second]), 1.0)
    popularity = dataset.training_counts(LEAVE_TWO_OUT).numpy() + 1.0
    likeness = np.log((together + 0.3) / (np.outer(popularity, popularity) / popularity.sum() + 0.3))
    ranks = []
    for row, place in zip(*dataset.targets(LEAVE_TWO_OUT, "test"), strict=True):
        begin = dataset.user_offsets[row]
        items = events["item"][begin:place]
        breaks = np.flatnonzero(np.diff(events["timestamp"][begin : place + 1]) > HOUR_S)
        recent = items[breaks[-1] + 1 :] if breaks.size else items
        used = recent if keep == "session" and recent.size else items
        scores = likeness[used].mean(0) + 0.5 * np.log(popularity)
        scores[items] = -np.inf
        ranks.append(1 + int((scores > scores[events["item"][place]]).sum()))
    return torch.tensor(ranks)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_oracle_stands_far_above_popularity(made: tuple[Path, dict[str, Any]], part: HeldOut) -> None:
    folder, info = made
    dataset = PreparedDataset.open(folder)
    oracle = info["oracle"][part]
    data = DataConfig(max_seq_len=5, eval_batch_size=600)
    loader = EvaluationLoader(dataset, data, part, Worker(0, 1, torch.device("cpu")))
    world = World.alone(torch.device("cpu"))
    _, place = Popularity.of(dataset.training_counts(LEAVE_TWO_OUT), dataset.num_items, world).of_items(
        torch.arange(dataset.num_items)
    )
    ranks = [popularity_ranks(place[b.targets], place[b.seen_ids], b.seen_offsets) for b in loader.batches()]
    popularity = rank_metrics(torch.cat(ranks))
    assert 0.3 < oracle["hr@10"] < 0.55
    assert 0.015 < popularity["hr@10"] < 0.07
    assert oracle["ndcg@10"] > 6 * popularity["ndcg@10"]


def test_sessions_tell_what_comes_next(made: tuple[Path, dict[str, Any]]) -> None:
    folder, info = made
    dataset = PreparedDataset.open(folder)
    by_session = rank_metrics(ranks_by_recent_neighbours(dataset, "session"))["hr@10"]
    by_history = rank_metrics(ranks_by_recent_neighbours(dataset, "history"))["hr@10"]
    assert by_session > 1.3 * by_history  # time and order matter
    assert 0.3 * info["oracle"]["test"]["hr@10"] < by_session < info["oracle"]["test"]["hr@10"]


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        prepare_synthetic("quickstart", tmp_path / name, users=30, items=60, seed=seed)
    contents = {name: (tmp_path / name / "part-00000.parquet").read_bytes() for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "slow"}, "--synthetic slow: no such generator"),
        ({"items": 10}, "--items 10: expected at least 20"),
        ({"users": 0}, "--users 0: expected at least 1"),
    ],
)
def test_impossible_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_synthetic(**{"name": "quickstart", "output": tmp_path / "x", **options})
    assert not list(tmp_path.iterdir())
