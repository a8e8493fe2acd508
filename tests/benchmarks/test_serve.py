"""`benchmarks.serve`: figures follow from the requests, and both servers give the model's lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serve import Repetition, figures, main, shared_items
from benchmarks.serving.models import random_histories


def test_figures_are_those_of_the_requests() -> None:
    times = [[1.0] * 20, [2.0] * 40, [3.0] * 30]
    found = figures([Repetition(each, requests=60, cpu_seconds=0.12) for each in times], seconds=2.0)
    assert (found["requests_per_s"], found["spread"], found["requests"]) == (15.0, 5.0, 90)
    assert (found["p50_ms"], found["p99_ms"], found["cpu_ms"]) == (2.0, 3.0, pytest.approx(2.0))


def test_items_shared_by_the_lists() -> None:
    def answer(*lists: list[int]) -> dict[str, object]:
        return {"results": [{"item_ids": items} for items in lists]}

    assert shared_items([answer([1, 2]), answer([3, 4])], [answer([2, 1]), answer([4, 5])]) == 0.75


def test_histories_are_valid_requests() -> None:
    for history in random_histories(50, 40, 30):
        times = history["timestamps"]
        assert 1 <= len(history["item_ids"]) == len(times) <= 30
        assert times == sorted(times) and history["request_timestamp"] > times[-1]
        assert all(1_000 <= item < 1_040 for item in history["item_ids"])


@pytest.mark.slow
def test_both_servers_answer_and_give_the_same_lists(tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    small = ["model.embedding_dim=16", "model.num_tables=2", "model.num_blocks=1", "data.max_seq_len=24"]
    main(
        items="2000",
        clients="1,3",
        searches="exact,index",
        seconds=0.3,
        repetitions=2,
        models=tmp_path / "models",
        json_path=file,
        overrides=small,
    )
    result = json.loads(file.read_text())
    assert result["max_seq_len"] == 24 and result["versions"]["fastapi"] and result["mean_events"] <= 24
    keys = ("items", "search", "clients", "server")
    assert [tuple(row[key] for key in keys) for row in result["rows"]] == [
        (2000, search, clients, server)
        for search in ("exact", "index")
        for clients in (1, 3)
        for server in ("mme", "plain")
    ]
    for row in result["rows"]:
        assert row["items_shared_with_plain"] == pytest.approx(1, abs=0.01)  # neighbours may have nearly equal scores
        assert row["requests_per_s"] > 0 and row["cpu_ms"] > 0 and row["p50_ms"] <= row["p99_ms"]
        assert row.get("index") == ("exact" if row["search"] == "index" else None)
    mine, plain = result["rows"][:2]
    assert mine["ratio"] == pytest.approx(mine["requests_per_s"] / plain["requests_per_s"])
