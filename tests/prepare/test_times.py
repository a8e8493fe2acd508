"""Times in every common form are sorted and deduplicated at their resolution and written as seconds, or rejected."""

from __future__ import annotations

import datetime
from decimal import Decimal
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.data.dataset import PreparedDataset
from mme.errors import UserError
from mme.prepare.pipeline import add_events, prepare
from tests.prepare.test_formats import read, write

CASES = Path(__file__).parents[3] / "shared" / "cases"
START = 1_600_000_000  # 2020-09-13T12:26:40Z
UTC = datetime.timezone.utc


def events(folder: Path, times: list[str], **options: Any) -> list[tuple[int, int]]:
    """The item (the number of the row, from 0) and the seconds of one user's events, in order."""
    rows = [f'1,{item},"{time}"' for item, time in enumerate(times)]
    file = write(folder / "a.csv", "user,item,time", *rows)
    prepare([file], "auto", folder / "out", min_user_events=1, **options)
    return [event for user in read(folder / "out").values() for event in user]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["1600000000.9", "1600000000.10", "1600000000", "1599999999.999"], [(3, -1), (2, 0), (1, 0), (0, 0)]),
        (["1600000001.5", "1.6000000005e9", "1600000000.25"], [(2, 0), (1, 0), (0, 1)]),
        (["1600000000900", "1600000000100", "1599999999999"], [(2, -1), (1, 0), (0, 0)]),
        (["1600000000000900", "1600000000000100", "1600000001000000"], [(1, 0), (0, 0), (2, 1)]),
        (["1600000000000000002", "1600000000000000001"], [(1, 0), (0, 0)]),
        (["2020-09-13T12:26:40.9Z", "2020-09-13T14:26:40.5+02:00", "2020-09-13 12:26:39+0000"], [(2, -1), (1, 0), (0, 0)]),
        (["2020-09-13 12:26:41", "2020-09-13T12:26:40.000000001", "2020-09-13 12:26:40"], [(2, 0), (1, 0), (0, 1)]),
        (["2020-09-13 12:26", "2020-09-13", "2020/09/13"], [(1, -44_800), (2, -44_800), (0, -40)]),
        (["20200913T122641Z", "20200913T122640.5Z", "2020-09-13T09:26:40-03"], [(2, 0), (1, 0), (0, 1)]),
    ],
)  # fmt: skip
def test_text(tmp_path: Path, times: list[str], expected: list[tuple[int, int]]) -> None:
    assert events(tmp_path, times) == [(item, START + second) for item, second in expected]


@pytest.mark.parametrize("time", ["1600753e66", "-1.6e40", "1e19"])
def test_a_number_beyond_64_bits_is_malformed(tmp_path: Path, time: str) -> None:
    found = events(tmp_path, ["1600000000", time, "1.6e9"], max_malformed_share=0.4)
    assert found == [(0, START), (2, START)]


def test_years_that_nanoseconds_can_not_count(tmp_path: Path) -> None:
    times = ["1601-01-02T00:00:00Z", "2400-02-29T23:59:60Z", "1969-12-31T23:59:58.25Z"]
    first = int(datetime.datetime(1601, 1, 2, tzinfo=UTC).timestamp())
    last = int(datetime.datetime(2400, 3, 1, tzinfo=UTC).timestamp())
    assert events(tmp_path, times) == [(0, first), (2, -2), (1, last)]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1.75, 1.5, 1.25], pa.float64(), [(2, 1), (1, 1), (0, 1)]),
        ([START + 0.9, START + 0.1, START - 0.1], pa.float64(), [(2, START - 1), (1, START), (0, START)]),
        ([START * 1000 + 900, START * 1000 + 100], pa.uint64(), [(1, START), (0, START)]),
        ([float(START * 1000) + 0.75, float(START * 1000) + 0.25], pa.float64(), [(1, START), (0, START)]),
        ([Decimal("1600000000.9"), Decimal("1600000000.1")], pa.decimal128(20, 3), [(1, START), (0, START)]),
        ([START, START - 1], pa.decimal128(20, 0), [(1, START - 1), (0, START)]),
        ([900, 100, -100], pa.timestamp("ms"), [(2, -1), (1, 0), (0, 0)]),
        ([900, 100, -100], pa.timestamp("us", "Europe/Berlin"), [(2, -1), (1, 0), (0, 0)]),
        ([1, 0, -1], pa.timestamp("ns"), [(2, -1), (1, 0), (0, 0)]),
        ([1, 0, -1], pa.timestamp("s"), [(2, -1), (1, 0), (0, 1)]),
        ([1, 0, -1], pa.date32(), [(2, -86_400), (1, 0), (0, 86_400)]),
        ([86_400_000, 0], pa.date64(), [(1, 0), (0, 86_400)]),
        (["2020-09-13T12:26:40.9", "2020-09-13T12:26:40.1"], pa.string_view(), [(1, START), (0, START)]),
    ],
)
def test_types_of_parquet(
    tmp_path: Path, values: list[Any], kind: pa.DataType, expected: list[tuple[int, int]]
) -> None:
    times = pa.array(values, kind)
    pq.write_table(
        pa.table({"user": [1] * len(times), "item": range(len(times)), "time": times}), tmp_path / "a.parquet"
    )
    prepare([tmp_path / "a.parquet"], "auto", tmp_path / "out", min_user_events=1)
    assert read(tmp_path / "out") == {1: expected}


def test_events_that_differ_below_a_second_are_no_duplicates(tmp_path: Path) -> None:
    """The rows of 02_ms_repeat.csv: each user has the same item twice within a second."""
    rows = [f"1,{item},{START * 1000 + time}" for item, time in [(10, 0), (10, 300), (10, 300), (11, 5000)]]
    info = prepare([write(tmp_path / "a.csv", "user,item,time", *rows)], "auto", tmp_path / "out")
    assert (info["num_events"], info["duplicate_rows"]) == (3, 1)
    assert read(tmp_path / "out") == {1: [(10, START), (10, START), (11, START + 5)]}


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_added_days_keep_the_order_below_a_second(tmp_path: Path, order: tuple[int, ...]) -> None:
    """The days are in ms, s and µs; users that the filter leaves out for two days come back in order."""
    days = [
        write(tmp_path / "0.csv", "user,item,time", *(f"{u},{i},{START * 1000 + 100 * i}" for u in (1, 2) for i in (1, 9))),
        write(tmp_path / "1.csv", "user,item,time", *(f"{u},{i},{START + i - 2}" for u in (1, 2) for i in (2, 3)), f"3,1,{START}"),
        write(tmp_path / "2.csv", "user,item,time", *(f"{u},{i},{START * 10**6 + i}" for u in (1, 3) for i in (1, 5, 7))),
    ]  # fmt: skip
    days = [days[number] for number in order]
    prepare(days[:1], "auto", tmp_path / "grown", min_user_events=2, min_item_events=2)
    for day in days[1:]:
        add_events([day], tmp_path / "grown")
    again = add_events(days, tmp_path / "grown")
    whole = prepare(days, "auto", tmp_path / "whole", min_user_events=2, min_item_events=2)
    assert read(tmp_path / "grown") == read(tmp_path / "whole")
    assert again["num_events"] == whole["num_events"] and again["duplicate_rows"] == whole["rows_read"]
    columns = ["user_id", "timestamps", "fractions_ns"]
    parts = [pq.read_table(tmp_path / name / "part-00000.parquet", columns=columns) for name in ("grown", "whole")]
    assert sorted(parts[0].to_pylist(), key=str) == sorted(parts[1].to_pylist(), key=str)
    PreparedDataset.open(tmp_path / "grown")


def test_a_set_in_seconds_has_no_fractions(tmp_path: Path) -> None:
    info = prepare([write(tmp_path / "a.csv", "user,item,time", "1,1,5", "1,2,6", "1,3,7")], "auto", tmp_path / "out")
    assert info["has_fractions"] is False
    assert "fractions_ns" not in pq.read_schema(tmp_path / "out" / "part-00000.parquet").names


def test_before_1970(tmp_path: Path) -> None:
    """Times before 1970 are valid, but -1 and similar numbers are codes for a missing time."""
    times = ["-86401", "-1000000000", "-1", "-86400", "0", "-9", "-999", "-99999999999"]
    rows = [f"1,{item},{time}" for item, time in enumerate(times)]
    file = write(tmp_path / "a.csv", "user,item,time", *rows)
    info = prepare([file], "auto", tmp_path / "out", max_malformed_share=0.9, time_unit="s")
    assert read(tmp_path / "out") == {1: [(1, -(10**9)), (0, -86_401), (4, 0)]}
    assert {reason: found["rows"] for reason, found in info["malformed"].items()} == {
        "negative time in time": 4,
        "time out of range in time": 1,
    }
    with pytest.raises(
        UserError, match=r"5 of 8 rows are malformed.*negative time in time: 4 \(first: a.csv line 4: '-1'\)"
    ):
        prepare([file], "auto", tmp_path / "out", time_unit="s")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_file_of_the_sixties(tmp_path: Path, unit: str) -> None:
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    times = [(-200_000_000 - n) * scale + scale // 2 for n in range(3)]
    assert events(tmp_path, [str(time) for time in times], time_unit="auto" if unit == "s" else unit) == [
        (n, -200_000_000 - n) for n in (2, 1, 0)
    ]


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        (["2021-04-03", "03/04/2021"], {}, r"a.csv: line 3: column 'time' holds '03/04/2021': day or month may come first"),
        (["13/04/2021 10:00", "14/04/2021 10:00"], {}, r"a.csv: line 2: .*'13/04/2021 10:00': day or month may come first"),
        (["3.4.21", "4.4.21"], {}, r"a.csv: line 2: .*'3.4.21': day or month may come first; expected ISO 8601"),
        (["1600000000000", "1600000000"], {}, r"time of another unit in time: 1 \(first: a.csv line 3: '1600000000'\)"),
        (["1600000000", "1600000000", "1600000000000"], {}, r"time out of range in time: 1 \(first: a.csv line 4: "),
        (["2021-04-03T00:00:00Z"] * 2 + ["2021-04-03T00:00:00"], {}, r"time without zone in time: 1 \(first: a.csv line 4"),
        (["2021-02-29", "2021-02-28"], {"time_unit": "iso"}, r"not a time in time: 1 \(first: a.csv line 2: '2021-02-29'"),
        (["30000000000"] * 2, {}, r"30000000000 .*is 2920-08-30 in s, 1970-12-14 in ms: say which by --time-unit s or ms"),
        (["20200913", "20210101"], {}, r"could be a date \(YYYYMMDD\) or a number of s since 1970: .*--time-unit iso or s"),
        (["20200913122640", "20210101122640"], {}, r"could be a date \(YYYYMMDD\).*--time-unit iso or ms"),
        (["soon", "later"], {}, r"a.csv: line 2: column 'time' holds 'soon', expected a time: a number of s, ms, us or ns"),
        (["1"], {"time_unit": "h"}, r"--time-unit h: expected one of auto, s, ms, us, ns, iso"),
    ],
)  # fmt: skip
def test_what_can_not_be_told_is_refused(
    tmp_path: Path, times: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        events(tmp_path, times, **options)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_what_the_user_says_decides(tmp_path: Path) -> None:
    assert events(tmp_path, ["30000000000", "30000000500"], time_unit="ms") == [(0, 30_000_000), (1, 30_000_000)]
    assert events(tmp_path, ["20200914", "20200913"], time_unit="iso") == [(1, START - 44_800), (0, START + 41_600)]
    assert events(tmp_path, ["20200913122640"], time_unit="iso") == [(0, START)]


def test_a_name_that_contradicts_the_size(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "user,item,time_ms", *(f"1,{item},{START + item}" for item in range(3)))
    with pytest.raises(
        UserError, match=r"column 'time_ms': 1600000001 .* is 1970-01-19 in ms, 2020-09-13 in s: say which"
    ):
        prepare([file], "auto", tmp_path / "out")
    told: list[str] = []
    prepare([file], "auto", tmp_path / "out", time_unit="ms", tell=told.append)
    assert "milliseconds since 1970 (are they? 1600000001 in the middle" in told[0]
    assert read(tmp_path / "out") == {1: [(item, 1_600_000) for item in range(3)]}


def test_floats_too_coarse_for_seconds(tmp_path: Path) -> None:
    times = np.array([START, START + 200], np.float32)
    pq.write_table(pa.table({"user": [1, 1], "item": [1, 2], "time": times}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column 'time' holds float, which rounds the seconds of 2020 to 128"):
        prepare([tmp_path / "a.parquet"], "auto", tmp_path / "out")


def test_units_of_several_files_are_told(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.csv", "user,item,time", "1,1,1600000003", "1,2,1600000001"),
        write(tmp_path / "b.csv", "user,item,time", "1,3,1600000002500"),
    ]
    told: list[str] = []
    prepare(files, "auto", tmp_path / "out", tell=told.append)
    assert read(tmp_path / "out") == {1: [(2, START + 1), (3, START + 2), (1, START + 3)]}
    assert "a.csv: seconds since 1970" in told[0] and "b.csv: milliseconds since 1970" in told[0]
    assert "warning: times are written in different ways" in told[0]


def test_times_in_json_change_their_form(tmp_path: Path) -> None:
    lines = [
        f'{{"user": 1, "item": {item}, "time": {time}}}' for item, time in [(1, START), (2, f"{START}.5"), (3, START)]
    ]
    prepare([write(tmp_path / "a.jsonl", *lines)], "auto", tmp_path / "out")
    assert read(tmp_path / "out") == {1: [(1, START), (3, START), (2, START)]}


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases beside the checkout")
def test_the_days_of_the_cases(tmp_path: Path) -> None:
    days = [CASES / "34_ms_day1.csv", CASES / "34_ms_day2.csv"]
    for name, (first, second) in {"a": days, "b": days[::-1]}.items():
        prepare([first], "auto", tmp_path / name, min_user_events=1)
        add_events([second], tmp_path / name)
        assert [item for item, _ in read(tmp_path / name)[1]] == [1, 4, 2, 2, 3]
