"""Ids follow the same rule in every format: 64-bit whole numbers, or text."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.errors import UserError
from mme.prepare.pipeline import add_events, prepare
from tests.prepare.test_formats import read, write

BIG = 2**64 - 1


def write_ids(path: Path, items: list[Any], kind: pa.DataType | None = None) -> Path:
    """Writes the events of one user, one per second, in the format of the file's name."""
    times = range(len(items))
    if path.suffix == ".csv":
        return write(path, "user,item,time", *(f"7,{item},{time}" for item, time in zip(items, times, strict=True)))
    if path.suffix == ".jsonl":
        return write(
            path,
            *(json.dumps({"user": 7, "item": item, "time": time}) for item, time in zip(items, times, strict=True)),
        )
    pq.write_table(pa.table({"user": [7] * len(items), "item": pa.array(items, kind), "time": times}), path)
    return path


def items_of(folder: Path) -> list[Any]:
    (events,) = read(folder).values()
    return [item for item, _ in events]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("items", "id_type"),
    [
        ([3, 1, 2], "int64"),
        ([-5, -(2**63), 2**63 - 1], "int64"),
        ([5, BIG, 2**63], "uint64"),
        ([2**63 - 1, 2**63 + 5, 0], "uint64"),
    ],
)
def test_whole_numbers_of_64_bits(tmp_path: Path, ending: str, items: list[int], id_type: str) -> None:
    kind = pa.uint64() if id_type == "uint64" else pa.int64()
    info = prepare([write_ids(tmp_path / f"a.{ending}", items, kind)], "auto", tmp_path / "out")
    assert items_of(tmp_path / "out") == items
    assert info["id_types"] == {"user": "int64", "item": id_type} and info["malformed_rows"] == 0
    assert pq.read_table(tmp_path / "out" / "items.parquet")["item_id"].to_pylist() == sorted(items)


@pytest.mark.parametrize("large_user", [False, True])
def test_unsigned_ids_grow(tmp_path: Path, large_user: bool) -> None:
    """Users and items above 2^63 - 1 are filtered, left out, brought back by later additions, and kept in the order of the ids."""
    shift = 2**63 if large_user else 0
    rows = [
        (user + shift * (user % 2), 2**63 * (item % 2) + item, 10 * item)
        for user in range(4)
        for item in range(user + 1)
    ]
    days = [rows[:4], rows[4:7], rows[7:]]
    files = []
    for number, day in enumerate(days):
        columns = [pa.array(values, pa.uint64()) for values in zip(*day, strict=True)]
        pq.write_table(
            pa.table(dict(zip(["user", "item", "time"], columns, strict=True))), tmp_path / f"{number}.parquet"
        )
        files.append(tmp_path / f"{number}.parquet")
    prepare(files, "auto", tmp_path / "whole", min_user_events=2, min_item_events=2)
    prepare(files[:2], "auto", tmp_path / "grown", min_user_events=2, min_item_events=2)
    info = add_events(files[2:], tmp_path / "grown")
    assert read(tmp_path / "grown") == read(tmp_path / "whole")
    assert list(read(tmp_path / "whole")) == sorted(read(tmp_path / "whole"))
    assert info["id_types"] == {"user": "uint64" if large_user else "int64", "item": "uint64"}


def test_no_type_for_negative_and_large_ids(tmp_path: Path) -> None:
    file = write_ids(tmp_path / "a.csv", [1, 2**63, -1])
    with pytest.raises(
        UserError, match=r"a.csv: line 3: column 'item' holds 9223372036854775808: no 64-bit type has both"
    ):
        prepare([file], "auto", tmp_path / "out")
    prepare([file], "auto", tmp_path / "out", id_type="text")
    assert items_of(tmp_path / "out") == ["1", str(2**63), "-1"]


@pytest.mark.parametrize(
    ("items", "kind", "expected"),
    [
        (["007", "7", "12"], None, ["007", "7", "12"]),
        (["7", "12", "x"], None, [7, 12]),
        (["7", "a1", "x"], None, ["7", "a1", "x"]),
        ([" a ", "a\t", "b"], None, ["a", "a", "b"]),
        (["1.0", "2.0", "1"], None, [1, 2, 1]),
        (["-0", "1", "2"], None, [1, 2]),
        (["18446744073709551616", "1", "2"], None, [1, 2]),
        ([1.0, 2.0, float("nan")], pa.float64(), [1, 2]),
        ([1.0, 2.0, 2.0**53 + 2], pa.float64(), [1, 2]),
        ([1.0, 2.0, 2.0**24 + 2], pa.float32(), [1, 2]),
        ([1.0, 2.0, 3.0], pa.float16(), [1, 2, 3]),
        ([Decimal(3), Decimal(BIG), Decimal(0)], pa.decimal128(20, 0), [3, BIG, 0]),
        ([Decimal("3.00"), Decimal("4.00"), Decimal("4.50")], pa.decimal128(20, 2), [3, 4]),
        ([b"b", b"a", b"c"], pa.binary(), ["b", "a", "c"]),
        ([b"b", b"a", b"\xff"], pa.binary_view(), ["b", "a"]),
        ([b"1", b"2", b"3"], pa.binary(1), [1, 2, 3]),
        (["b", "a", "c"], pa.string_view(), ["b", "a", "c"]),
        (["9", "8", "7"], pa.large_string(), [9, 8, 7]),
        (["b", "a", "b"], pa.dictionary(pa.int8(), pa.string()), ["b", "a", "b"]),
        ([5, 6, 5], pa.dictionary(pa.int8(), pa.uint64()), [5, 6, 5]),
        ([5, 6, 7], pa.uint8(), [5, 6, 7]),
    ],
)  # fmt: skip
def test_types_and_texts(tmp_path: Path, items: list[Any], kind: pa.DataType | None, expected: list[Any]) -> None:
    file = write_ids(tmp_path / "a.parquet", items, kind)
    info = prepare([file], "auto", tmp_path / "out", min_user_events=1, max_malformed_share=0.5)
    assert items_of(tmp_path / "out") == expected
    assert info["malformed_rows"] == len(items) - len(expected)


def test_bytes_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    file = write_ids(tmp_path / "a.parquet", [b"b", b"a", b"\xff"], pa.binary())
    info = prepare([file], "auto", tmp_path / "out", min_user_events=1, max_malformed_share=0.5)
    assert list(info["malformed"]) == ["not UTF-8 in item"]


@pytest.mark.parametrize(
    ("items", "kind"),
    [(["7", "8", "9"], pa.string()), ([7, 8, 9], pa.int64()), ([7.0, 8.0, 9.0], pa.float64()), ([7, 8, 9], pa.decimal128(9, 2))],
)  # fmt: skip
def test_numbers_as_text(tmp_path: Path, items: list[Any], kind: pa.DataType) -> None:
    prepare([write_ids(tmp_path / "a.parquet", items, kind)], "auto", tmp_path / "out", id_type="text")
    assert items_of(tmp_path / "out") == ["7", "8", "9"]


def test_text_as_numbers(tmp_path: Path) -> None:
    file = write_ids(tmp_path / "a.csv", ["x", "y", "z", "4"])
    with pytest.raises(UserError, match=r"holds string \('x'\), --id-type integer asks for whole numbers"):
        prepare([file], "auto", tmp_path / "out", id_type="integer")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_numbers_turn_into_text_later(tmp_path: Path, ending: str) -> None:
    """Such an id after the sample is malformed, and the message has the option that helps; with it all ids are text."""
    items: list[Any] = [*range(100_000), *(f"a{n}" for n in range(3000))]
    file = write_ids(tmp_path / f"a.{ending}", items)
    with pytest.raises(UserError, match=r"not a whole number in item: 3000 .*--id-type text"):
        prepare([file], "auto", tmp_path / "out")
    prepare([file], "auto", tmp_path / "out", id_type="text")
    assert items_of(tmp_path / "out") == [str(item) for item in items]


def test_large_numbers_come_late_in_json(tmp_path: Path) -> None:
    items = [*range(100_000), 2**63, 5, BIG]
    info = prepare([write_ids(tmp_path / "a.jsonl", items)], "auto", tmp_path / "out")
    assert items_of(tmp_path / "out") == items and info["id_types"]["item"] == "uint64"


@pytest.mark.parametrize(
    ("first", "second", "kind", "message"),
    [
        ([1, 2, 3], ["a", "b"], pa.string(), r"b.parquet: column 'item' holds string \('a'\), those before it are integers"),
        (["a", "b", "c"], [1, 2], pa.int64(), r"b.parquet: column 'item' holds int64 \('1'\), those before it are text"),
        ([1, 2, 3], ["007"], pa.string(), r"'007'\), those before it are integers: prepare all files with --id-type text"),
        ([1, 2, 3], [[1]], pa.list_(pa.int64()), r"column 'item' holds list<.*>, expected ids \(integer or text\)"),
        ([1, 2, 3], [True], pa.bool_(), r"column 'item' holds bool, expected ids"),
    ],
)  # fmt: skip
def test_ids_of_another_kind_are_refused(
    tmp_path: Path, first: list[Any], second: list[Any], kind: pa.DataType, message: str
) -> None:
    files = [write_ids(tmp_path / "a.parquet", first), write_ids(tmp_path / "b.parquet", second, kind)]
    with pytest.raises(UserError, match=message):
        prepare(files, "auto", tmp_path / "out")
    prepare(files[:1], "auto", tmp_path / "out")
    before = (tmp_path / "out" / "dataset.json").read_bytes()
    message = message.replace("those before it", "the item ids of the training set")
    with pytest.raises(UserError, match=message):
        add_events(files[1:], tmp_path / "out")
    assert (tmp_path / "out" / "dataset.json").read_bytes() == before


def test_numbers_join_a_set_of_texts_when_asked(tmp_path: Path) -> None:
    prepare([write_ids(tmp_path / "a.csv", ["a", "b", "12"])], "auto", tmp_path / "out")
    add_events([write(tmp_path / "b.csv", "user,item,time", "7,12,9")], tmp_path / "out")  # CSV has text anyway
    add_events([write_ids(tmp_path / "c.parquet", [12])], tmp_path / "out", id_type="text")
    assert items_of(tmp_path / "out") == ["a", "12", "b", "12", "12"]


def test_a_signed_set_takes_no_larger_ids(tmp_path: Path) -> None:
    prepare([write_ids(tmp_path / "a.csv", [1, 2, 3])], "auto", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"id above 2\^63 - 1 in item: 1 \(first: b.csv line 2: '9223372036854775808'\)"
    ):
        add_events([write_ids(tmp_path / "b.csv", [2**63])], tmp_path / "out")
    prepare([write_ids(tmp_path / "a.csv", [1, 2, 2**63])], "auto", tmp_path / "out")
    with pytest.raises(UserError, match=r"negative id in item: 1 \(first: c.csv line 2: '-4'\)"):
        add_events([write_ids(tmp_path / "c.csv", [-4])], tmp_path / "out")
