"""Histories of requests are read with the right values, or rejected with their row."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.config import load_config
from mme.data.description import read_info
from mme.data.id_lookup import IdLookup
from mme.data.numbering import Numbering
from mme.data.times import time_range
from mme.errors import UserError
from mme.evaluation.requests import Requests, check_requests, read_table, with_features
from mme.prepare.synthetic import prepare_synthetic

CATALOGUE = IdLookup(pa.array([10, 20, 30]))
TRAINED_ON = (1_000_000_000, 1_100_000_000)
T0 = 1_050_000_000


def write(folder: Path, **columns: Any) -> Path:
    """Two histories of one and of three events, with ``columns`` in place of those of the same name."""
    path = folder / "histories.parquet"
    defaults: dict[str, Any] = {
        "user_id": ["a", "b"],
        "item_ids": [[20], [10, 30, 10]],
        "timestamps": [[T0], [T0, T0 + 5, T0 + 5]],
    }
    pq.write_table(
        pa.table({name: values for name, values in (defaults | columns).items() if values is not None}), path
    )
    return path


def read(path: Path, **options: Any) -> Requests:
    return check_requests(read_table(path), str(path), CATALOGUE, TRAINED_ON, **options)


def test_events_become_item_indices_and_the_request_is_at_the_last_event(tmp_path: Path) -> None:
    requests = read(write(tmp_path))
    assert requests.user_ids.to_pylist() == ["a", "b"]
    assert requests.offsets.tolist() == [0, 1, 4]
    assert requests.items.tolist() == [1, 0, 2, 0]
    assert requests.times.tolist() == [T0, T0, T0 + 5, T0 + 5]
    assert requests.request_times.tolist() == [T0, T0 + 5]


def test_events_of_unknown_items_go_with_their_times(tmp_path: Path) -> None:
    requests = read(write(tmp_path, item_ids=[[99], [10, 99, 30]]))
    assert requests.items.tolist() == [-1, 0, -1, 2]
    known = requests.of_known_items()
    assert known.offsets.tolist() == [0, 0, 2]
    assert (known.items.tolist(), known.times.tolist()) == ([0, 2], [T0, T0 + 5])
    assert known.request_times.tolist() == [T0, T0 + 5]
    with pytest.raises(UserError, match="row 0: item 99 is unknown: expected one of the 3 items"):
        read(write(tmp_path, item_ids=[[99], [10, 99, 30]]), unknown="refuse")


def test_the_request_time_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, request_timestamp=[T0 + 7, T0 + 9])
    assert read(path).request_times.tolist() == [T0 + 7, T0 + 9]
    assert read(path, request_time="column").request_times.tolist() == [T0 + 7, T0 + 9]
    assert read(path, request_time="last").request_times.tolist() == [T0, T0 + 5]
    before = int(time.time())
    now = read(path, request_time="now").request_times
    assert before <= now[0] == now[1] <= time.time()
    with pytest.raises(UserError, match="no column 'request_timestamp', which --request-time column needs"):
        read(write(tmp_path), request_time="column")


def test_a_request_without_a_time_is_at_its_last_event(tmp_path: Path) -> None:
    for times in ([None, T0 + 9], [float("nan"), float(T0 + 9)]):  # pandas writes an integer column with gaps as floats
        path = write(tmp_path, request_timestamp=pa.array(times, from_pandas=True))
        for request_time in (None, "column"):
            assert read(path, request_time=request_time).request_times.tolist() == [T0, T0 + 9]
    assert read(write(tmp_path, request_timestamp=[None, None])).request_times.tolist() == [T0, T0 + 5]


MILLISECONDS = [[T0 * 1000], [T0 * 1000] * 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"timestamps": [[T0], [T0, T0 + 5, T0 + 4]]},
            f"row 1: timestamp {T0 + 4} follows {T0 + 5}, expected the events",
        ),
        ({"timestamps": [[T0 + 9], [T0 + 9, T0 + 8, T0 + 9]]}, f"row 1: timestamp {T0 + 8} follows {T0 + 9}"),
        ({"timestamps": MILLISECONDS}, "row 0: timestamps: 1050000000000 is far from the times of the training data"),
        ({"timestamps": MILLISECONDS}, "it looks like milliseconds; expected seconds"),
        ({"timestamps": [[T0], [T0, T0, T0 * 10**6]]}, "row 1: timestamps: 1050000000000000 is far"),
        ({"timestamps": [[T0], [12_000, 12_001, 12_002]]}, "row 1: timestamps: 12000 is far"),  # days since 1970
        ({"timestamps": [[T0], [T0, T0]]}, "row 1: 3 item_ids and 2 timestamps"),
        ({"timestamps": [[T0], [T0, None, T0]]}, "row 1: timestamps has a null"),
        ({"timestamps": [[1.5], [1.5] * 3]}, "column 'timestamps' contains double, expected integer seconds"),
        ({"item_ids": [[], [10, 30, 10]], "timestamps": [[], [T0] * 3]}, "row 0: no item_ids and no timestamps"),
        ({"item_ids": [["x"], ["y"] * 3]}, "column 'item_ids' contains string, expected the raw ids"),
        ({"item_ids": [10, 20]}, "column 'item_ids' contains int64, expected a list"),
        ({"request_timestamp": [T0 - 1, T0 + 9]}, f"row 0: request_timestamp ({T0 - 1}) is before the history's last"),
        ({"request_timestamp": [T0, T0 * 1000]}, "row 1: request_timestamp: 1050000000000 is far"),
        (
            {"request_timestamp": [T0 + 0.5, None]},
            "column 'request_timestamp': Float value 1050000000.500000 was truncated",
        ),
        (
            {"request_timestamp": ["now", None]},
            "column 'request_timestamp' contains string, expected the integer second",
        ),
        ({"request_timestamp": [None, T0 + 4]}, f"row 1: request_timestamp ({T0 + 4}) is before the history's last"),
        ({"user_id": None}, "no column 'user_id' (found: item_ids, timestamps)"),
    ],
)
def test_a_history_that_can_not_be_right_is_refused_with_its_row(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, **columns)
    with pytest.raises(UserError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_a_request_now_before_the_last_event_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, timestamps=[[T0], [T0, T0, int(time.time()) + 1000]])
    with pytest.raises(UserError, match=r"row 1: --request-time now \(\d+\) is before the history's last event"):
        read(path, request_time="now")


def test_a_pipe_and_a_table_with_a_column_twice_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(tmp_path / "pipe")
    table = pa.Table.from_arrays([pa.array([1])] * 4, names=["user_id", "item_ids", "timestamps", "user_id"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="two columns are named 'user_id'"):
        read(tmp_path / "twice.parquet")


def test_a_column_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1], "item_ids": [[1]]}), tmp_path / "odd.parquet", store_schema=False)
    content = (tmp_path / "odd.parquet").read_bytes()
    (tmp_path / "odd.parquet").write_bytes(content.replace(b"user_id", b"user_\xff\xfe"))
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(tmp_path / "odd.parquet")


def test_the_training_datas_times_are_known_without_reading_them(tmp_path: Path) -> None:
    prepare_synthetic("quickstart", tmp_path, users=20, items=30, seed=3)
    table = pq.read_table(tmp_path / "part-00000.parquet")
    times = [second for row in table["timestamps"].to_pylist() for second in row]
    assert time_range(tmp_path, read_info(tmp_path)) == (min(times), max(times))
    pq.write_table(table, tmp_path / "part-00000.parquet", write_statistics=False)
    assert time_range(tmp_path, read_info(tmp_path)) == (min(times), max(times))


def test_users_of_the_training_data_are_known_by_their_rows(tmp_path: Path) -> None:
    prepare_synthetic("quickstart", tmp_path / "data", users=20, items=30, seed=3)
    info = read_info(tmp_path / "data")
    model = load_config(None, ["data.path=unused", "model.user_features=[user_id]"]).model
    path = write(tmp_path, user_id=[7, 99])
    numbering = Numbering.read(tmp_path / "data", info, model.feature_columns)
    found = with_features(read(path), read_table(path), str(path), model, numbering)
    np.testing.assert_array_equal(found.of_users["user_id"], [8, 0])
