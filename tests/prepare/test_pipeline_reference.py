"""Compares the whole of `mme prepare` with a program in plain Python on small random inputs."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.prepare import measure
from mme.errors import UserError
from mme.prepare import event_store
from mme.prepare import writer as writer_module
from mme.prepare.pipeline import add_events, prepare
from mme.prepare.synthetic import prepare_synthetic

Event = tuple[Any, Any, int]

# Few values, so that duplicates, equal times and users that just miss a filter are common.
EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=60)


def plain_filter(events: list[Event], least_of_user: int, least_of_item: int, iterate: bool) -> list[Event]:
    while True:
        users, items = Counter(event[0] for event in events), Counter(event[1] for event in events)
        kept = [e for e in events if users[e[0]] >= least_of_user and items[e[1]] >= least_of_item]
        if len(kept) == len(events) or not iterate:
            return kept
        events = kept


def plain_sequences(events: list[Event]) -> dict[Any, list[tuple[Any, int]]]:
    """Raw user → (raw item, time); Python's sort is stable."""
    sequences: dict[Any, list[tuple[Any, int]]] = {user: [] for user in sorted({event[0] for event in events})}
    for user, item, time in sorted(events, key=lambda event: event[2]):
        sequences[user].append((item, time))
    return sequences


def read_rows(folder: Path, info: dict[str, Any]) -> list[tuple[Any, list[tuple[Any, int]]]]:
    """Raw user, events as raw item and time; in the order of the rows."""
    catalogue = dict(
        zip(
            *pq.read_table(folder / "items.parquet", columns=["item_index", "item_id"]).to_pydict().values(),
            strict=True,
        )
    )
    assert list(catalogue) == list(range(info["num_items"]))
    return [
        (row["user_id"], [(catalogue[i], t) for i, t in zip(row["item_ids"], row["timestamps"], strict=True)])
        for part in info["parts"]
        for row in pq.read_table(folder / part["file"]).to_pylist()
    ]


def write(folder: Path, name: str, events: list[Event], text: bool = False) -> Path:
    users, items, times = zip(*events, strict=True)
    table = pa.table(
        {
            "user_id": [f"u{user}" for user in users] if text else users,
            "item_id": [f"i{item}" for item in items] if text else items,
            "timestamp": times,
        }
    )
    pq.write_table(table, folder / name)
    return folder / name


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users extend over batches, and histories over row groups and parts."""
    monkeypatch.setattr(event_store, "EVENTS_AT_ONCE", 4)
    monkeypatch.setattr(writer_module.DatasetWriter.__init__, "__defaults__", (8,))


@settings(max_examples=30, deadline=None)
@given(EVENTS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 60))
def test_equals_plain_python(
    events: list[Event], least_of_user: int, least_of_item: int, iterate: bool, text: bool, cut: int
) -> None:
    distinct = list(dict.fromkeys(events))
    kept = plain_filter(distinct, least_of_user, least_of_item, iterate)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = [
            write(folder, f"{n}.parquet", half, text) for n, half in enumerate((events[:cut], events[cut:])) if half
        ]
        options: dict[str, Any] = {"min_user_events": least_of_user, "min_item_events": least_of_item}
        if not kept:
            with pytest.raises(UserError, match="nothing is left"):
                prepare(inputs, "parquet", folder / "out", filter_once=not iterate, **options)
            return
        info = prepare(inputs, "parquet", folder / "out", filter_once=not iterate, **options)
        rows = read_rows(folder / "out", info)
        counts = pq.read_table(folder / "out" / "items.parquet").to_pydict()
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    name = (lambda user, item: (f"u{user}", f"i{item}")) if text else (lambda user, item: (user, item))
    kept = [(*name(user, item), time) for user, item, time in kept]
    assert rows == list(plain_sequences(kept).items())
    assert counts["item_id"] == sorted({event[1] for event in kept})
    assert counts["count"] == [Counter(event[1] for event in kept)[item] for item in counts["item_id"]]
    assert (info["rows_read"], info["duplicate_rows"]) == (len(events), len(events) - len(distinct))
    assert info["events_dropped"] == len(distinct) - len(kept)
    assert info["users_dropped"] == len({event[0] for event in distinct}) - len(rows)
    assert info["items_dropped"] == len({event[1] for event in distinct}) - len(counts["item_id"])
    lengths = sorted(len(events) for _, events in rows)
    summary = info["statistics"]["events_per_user"]
    assert (summary["min"], summary["max"]) == (lengths[0], lengths[-1])
    assert summary["median"] == lengths[(len(lengths) + 1) // 2 - 1]
    assert summary["mean"] == pytest.approx(len(kept) / len(rows), abs=1e-4)
    assert info["statistics"]["events_per_item"]["gini"] == pytest.approx(plain_gini(counts["count"]), abs=1e-6)


def plain_gini(counts: list[int]) -> float:
    """The Gini coefficient: half the mean difference of all pairs over the mean."""
    return sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * sum(counts))


DAYS = st.lists(EVENTS, min_size=2, max_size=4)


@settings(max_examples=25, deadline=None)
@given(DAYS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_adding_days_equals_preparing_all_at_once(
    days: list[list[Event]], least_of_user: int, least_of_item: int, iterate: bool, text: bool
) -> None:
    """Days overlap in time, share events and bring back what the filters had dropped."""
    options: dict[str, Any] = {
        "min_user_events": least_of_user,
        "min_item_events": least_of_item,
        "filter_once": not iterate,
    }
    assume(plain_filter(list(dict.fromkeys(days[0])), least_of_user, least_of_item, iterate))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [write(folder, f"{n}.parquet", day, text) for n, day in enumerate(days)]
        whole = prepare(files, "parquet", folder / "whole", **options)
        info = prepare(files[:1], "parquet", folder / "grown", **options)
        users: list[Any] = []
        items: list[Any] = []
        for file in files[1:]:
            users = [user for user, _ in read_rows(folder / "grown", info)]
            items = list(read_items(folder / "grown"))
            info = add_events([file], folder / "grown")
        rows = read_rows(folder / "grown", info)
        assert [user for user, _ in rows][: len(users)] == users
        assert list(read_items(folder / "grown"))[: len(items)] == items
        assert dict(rows) == dict(read_rows(folder / "whole", whole)) and len(rows) == whole["num_users"]
        assert read_items(folder / "grown") == read_items(folder / "whole")
        assert left_out(folder / "grown") == left_out(folder / "whole")
    same = ["rows_read", "malformed_rows", "duplicate_rows", "users_dropped", "items_dropped", "events_dropped"]
    same += ["num_users", "num_items", "num_events", "statistics", "source", "settings", "id_types"]
    assert {key: info[key] for key in same} == {key: whole[key] for key in same}
    assert [run["rows_read"] for run in info["runs"]] == [len(day) for day in days]


def read_items(folder: Path) -> dict[Any, int]:
    """Raw item → events, in the order of the indices."""
    table = pq.read_table(folder / "items.parquet").to_pydict()
    return dict(zip(table["item_id"], table["count"], strict=True))


def left_out(folder: Path) -> dict[Any, list[tuple[Any, int, int]]]:
    """Raw user → item, time and place of the left-out events, in order."""
    found: dict[Any, list[tuple[Any, int, int]]] = {}
    if (folder / "left_out.parquet").exists():
        for row in pq.read_table(folder / "left_out.parquet").to_pylist():
            found.setdefault(row["user_id"], []).append((row["item_id"], row["timestamp"], row["place"]))
    return found


def test_only_the_parts_of_touched_users_are_written_again(tmp_path: Path) -> None:
    history = [(user, item, user) for user in range(6) for item in range(4)]
    info = prepare([write(tmp_path, "a.parquet", history)], "parquet", tmp_path / "out")
    before = [(tmp_path / "out" / part["file"]).stat().st_ino for part in info["parts"]]
    assert len(before) == 3  # two users each
    day = write(tmp_path, "b.parquet", [(2, 9, 7), (7, 0, 1), (7, 1, 1), (7, 2, 1)])
    info = add_events([day], tmp_path / "out")
    after = [(tmp_path / "out" / part["file"]).stat().st_ino for part in info["parts"]]
    assert [before[0] in after, before[1] in after, before[2] in after] == [True, False, True]
    rows = read_rows(tmp_path / "out", info)
    assert [user for user, _ in rows] == [0, 1, 2, 3, 4, 5, 7]
    assert rows[2][1][-1] == (9, 7)
    again = add_events([day], tmp_path / "out")
    assert read_rows(tmp_path / "out", again) == rows
    assert again["num_events"] == info["num_events"] and again["duplicate_rows"] == 4


def test_sets_that_can_not_be_added_to(tmp_path: Path) -> None:
    day = write(tmp_path, "a.parquet", [(1, 2, 3)] * 3)
    with pytest.raises(UserError, match=r"none: no such folder: expected a training set"):
        add_events([day], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    prepare_synthetic("quickstart", tmp_path / "made", users=5, items=100)
    with pytest.raises(UserError, match=r"made/dataset.json: a generated set, expected one made of files"):
        add_events([day], tmp_path / "made")
    info = json.loads((tmp_path / "made" / "dataset.json").read_text())
    (tmp_path / "made" / "dataset.json").write_text(json.dumps({**info, "format_version": 1}))
    with pytest.raises(UserError, match=r"dataset.json: format version 1, expected 2: prepare the set again"):
        add_events([day], tmp_path / "made")
    prepare([write(tmp_path, "b.parquet", [(1, n, 3) for n in range(3)])], "parquet", tmp_path / "numbers")
    with pytest.raises(
        UserError,
        match=r"c.parquet: column 'user_id' holds string \('u1'\), the user ids of the training set are integers",
    ):
        add_events([write(tmp_path, "c.parquet", [(1, 2, 3)], text=True)], tmp_path / "numbers")


@pytest.mark.slow
def test_memory_stays_below_its_limit(tmp_path: Path) -> None:
    """Without the limit, the same number of events takes 740 MiB."""
    result = measure(10_000_000, tmp_path, "600MiB", min_item_events=1)
    assert result["peak_rss_gib"] * 1024 < 600
    assert result["num_events"] == result["events"] - result["duplicate_rows"]
