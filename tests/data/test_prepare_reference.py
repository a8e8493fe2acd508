"""The whole of `mme prepare` against a program in plain Python, on random small inputs."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mme.data import event_store
from mme.data import writer as writer_module
from mme.data.prepare import prepare
from mme.errors import UserError

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
    """Users across batches, histories across row groups and parts."""
    monkeypatch.setattr(event_store, "EVENTS_AT_ONCE", 4)
    monkeypatch.setattr(writer_module.DatasetWriter.__init__, "__defaults__", (8,))


@settings(max_examples=40, deadline=None)
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
    """Half the mean difference of all pairs over the mean."""
    return sum(abs(a - b) for a in counts for b in counts) / (2 * len(counts) * sum(counts))
