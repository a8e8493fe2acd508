"""The base and the days that the benchmark of new items cuts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.new_items import cut


def test_events_are_cut_by_time(tmp_path: Path) -> None:
    times = [50, 10, 90, 20, 70, 30, 80, 40, 60, 100, 100]
    events = pa.table({"user_id": range(11), "item_id": range(11), "timestamp": times, "rating": times})
    parts = [pq.read_table(path) for path in cut(events, [0.5, 0.7, 0.9], tmp_path)]
    assert [sorted(part["timestamp"].to_pylist()) for part in parts] == [[10, 20, 30, 40, 50], [60, 70], [80, 90]]
    assert parts[0].column_names == ["user_id", "item_id", "timestamp"]
