"""Files of many kinds are read with the right values or rejected in one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.errors import UserError
from mme.prepare.pipeline import add_events, prepare
from tests.prepare.test_formats import read

START = 1_600_000_000
HEADER = "user_id,item_id,timestamp"
# (user, item, second): three users of four events, in the order of their times
EVENTS = [(user, 10 * user + n, START + 100 * user + n) for user in (1, 2, 3) for n in range(4)]


def by_user(
    user: Callable[[int], Any] = lambda user: user, item: Callable[[int], Any] = lambda item: item
) -> dict[Any, list[tuple[Any, int]]]:
    """The result of `read` for EVENTS whose ids are formatted by ``user`` and ``item``."""
    found: dict[Any, list[tuple[Any, int]]] = {}
    for u, i, second in EVENTS:
        found.setdefault(user(u), []).append((item(i), second))
    return found


def text(name: str, row: Callable[[int, int, int], str], header: str = HEADER) -> Callable[[Path], Path]:
    """Writes a file with one line for each of EVENTS."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.write_text("\n".join([header, *(row(*event) for event in EVENTS), ""]).removeprefix("\n"))
        return path

    return write


def lines(name: str, *content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text("\n".join([*content, ""]))
        return folder / name

    return write


def parquet(*columns: tuple[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        table = pa.Table.from_arrays([pa.array(values) for _, values in columns], names=[name for name, _ in columns])
        pq.write_table(table, folder / "events.parquet")
        return folder / "events.parquet"

    return write


def plain(user: Any, item: Any, second: Any) -> str:
    return f"{user},{item},{second}"


USERS, ITEMS, SECONDS = ([event[place] for event in EVENTS] for place in range(3))
BIG = 2**63 + 5


@dataclass(frozen=True)
class Kind:
    """A kind of file. ``expected`` is the result of `read`; ``said`` is what the user is told about the file beforehand."""

    write: Callable[[Path], Path]
    expected: dict[Any, list[tuple[Any, int]]]
    said: str = ""
    options: dict[str, Any] = field(default_factory=dict)


READ = {
    "milliseconds, not sorted": Kind(
        lines("a.csv", HEADER, f"7,3,{START}900", f"7,1,{START}100", f"7,2,{START}500", f"7,4,{START + 1}000"),
        {7: [(1, START), (2, START), (3, START), (4, START + 1)]},
        "timestamp (milliseconds since 1970)",
    ),
    "one item twice within a second": Kind(
        lines("a.csv", HEADER, f"7,1,{START}000", f"7,1,{START}300", f"7,2,{START}100"),
        {7: [(1, START), (2, START), (1, START)]},
    ),
    "header with blanks": Kind(text("a.csv", plain, "user_id, item_id , timestamp"), by_user()),
    "fields with blanks": Kind(text("a.csv", lambda u, i, s: f"{u}, {i} , {s}"), by_user()),
    "byte order mark before quotes": Kind(text("a.csv", plain, '\ufeff"user_id","item_id","timestamp"'), by_user()),
    "byte order mark without quotes": Kind(text("a.csv", plain, f"\ufeff{HEADER}"), by_user()),
    "header-less, columns by number": Kind(
        text("a.csv", lambda u, i, s: f"{u},{i},{s},4", ""),
        by_user(),
        "without a header",
        {"columns": {"user": "1", "item": "2", "timestamp": "3"}},
    ),
    "zero-padded ids": Kind(
        text("a.csv", lambda u, i, s: f"{u:05},{i:04},{s}"),
        by_user(lambda user: f"{user:05}", lambda item: f"{item:04}"),
        "user_id (text ids)",
    ),
    "unsigned 64-bit ids in Parquet": Kind(
        parquet(
            ("user_id", USERS), ("item_id", pa.array([BIG + i for i in ITEMS], pa.uint64())), ("timestamp", SECONDS)
        ),
        by_user(item=lambda item: BIG + item),
    ),
    "unsigned 64-bit ids in CSV": Kind(
        text("a.csv", lambda u, i, s: f"{u},{BIG + i if i % 2 else i},{s}"),
        by_user(item=lambda item: BIG + item if item % 2 else item),
    ),
    "negative ids": Kind(text("a.csv", lambda u, i, s: f"{-u},{i},{s}"), by_user(lambda user: -user)),
    "decimal ids": Kind(text("a.csv", lambda u, i, s: f"{u}.0,{i}.0,{s}"), by_user()),
    "ISO 8601 with a zone": Kind(
        text("a.csv", lambda u, i, s: f"{u},{i},2020-09-13T14:{26 + (s - START + 40) // 60:02}:{(s - START + 40) % 60:02}+02:00"),
        by_user(),
        "ISO 8601",
    ),
    "ISO 8601 without a zone": Kind(
        text("a.csv", lambda u, i, s: f"{u},{i},2020-09-13 12:{26 + (s - START + 40) // 60:02}:{(s - START + 40) % 60:02}.5"),
        by_user(),
    ),
    "dates": Kind(
        lines("a.csv", HEADER, "7,1,2021-04-02", "7,2,2021-04-01", "7,3,1969-12-30"),
        {7: [(3, -172_800), (2, 1_617_235_200), (1, 1_617_321_600)]},
    ),
    "JSON whose numbers become large, then text": Kind(
        lines(
            "a.jsonl",
            *(json.dumps({"user_id": u, "item_id": i, "timestamp": s}) for u, i, s in EVENTS),
            json.dumps({"user_id": 1, "item_id": BIG, "timestamp": START + 500}),
            json.dumps({"user_id": 1, "item_id": "12", "timestamp": START + 501}),
        ),
        by_user() | {1: [*by_user()[1], (BIG, START + 500), (12, START + 501)]},
    ),
    "a stray quote at the start of a field": Kind(
        text(
            "a.tsv",
            lambda u, i, s: f"{u}\t{i}\t{s}\t" + ('"Hello' if i == 21 else "thing"),
            "user_id\titem_id\ttimestamp\ttitle",
        ),
        by_user(),
        "separated by tab",
    ),
    "a quoted line break": Kind(
        text(
            "a.csv", lambda u, i, s: f'{u},"one\ntwo; three",{i},{s}', "user_id,title,item_id,timestamp"
        ),
        by_user(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ.values(), ids=READ)
def test_read_with_the_right_values(tmp_path: Path, kind: Kind) -> None:
    told: list[str] = []
    info = prepare([kind.write(tmp_path)], "auto", tmp_path / "out", tell=told.append, **kind.options)
    assert read(tmp_path / "out") == kind.expected
    assert (info["malformed_rows"], info["duplicate_rows"]) == (0, 0)
    assert kind.said in told[0]


def not_utf_8(folder: Path) -> Path:
    """A file with a column whose name is no text."""
    path = parquet(("user_id", USERS), ("item_id", ITEMS), ("timestamp", SECONDS))(folder)
    pq.write_table(pq.read_table(path), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"user_id", b"user_\xff\xfe"))
    return path


REFUSED = {
    "header-less, columns not given": (
        text("a.csv", lambda u, i, s: f"{u},{i},{s},4", ""),
        "a.csv: line 1: '1,10,1600000100,4': no header that names the columns; give the numbers of those of users, items and "
        "times, such as --user-column 1 --item-column 2 --timestamp-column 3, or --header if this line is one",
    ),
    "one name twice in CSV": (
        text("a.csv", lambda u, i, s: f"{u},{i},{s},9", f"{HEADER},user_id"),
        "a.csv: 2 columns are named 'user_id': expected one",
    ),
    "one name twice in Parquet": (
        parquet(("user_id", USERS), ("item_id", ITEMS), ("timestamp", SECONDS), ("user_id", USERS)),
        "events.parquet: 2 columns are named 'user_id': expected one",
    ),
    "a name that is not UTF-8 in Parquet": (
        not_utf_8,
        "events.parquet: not a readable Parquet file, perhaps truncated ('utf-8' codec can't decode byte 0xff in position 5",
    ),
    "day or month first": (
        lines("a.csv", HEADER, "7,1,03/04/2021"),
        "a.csv: line 2: column 'timestamp' holds '03/04/2021': day or month may come first; expected ISO 8601",
    ),
    "a quote closed after rows": (
        lines("a.csv", f"{HEADER},title", f'7,1,{START},"open', f"7,2,{START},x", f'7,3,{START},close"'),
        "a.csv: line 2: a quote opens here and closes 2 lines later",
    ),
    "an array of JSON": (
        lines("a.json", json.dumps([{"user_id": 1, "item_id": 2, "timestamp": START}])),
        "a.json: line 1: starts with '[', as a JSON array does: expected one JSON object per line, or CSV",
    ),
}


@pytest.mark.parametrize("kind", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(tmp_path: Path, kind: tuple[Callable[[Path], Path], str]) -> None:
    write, message = kind
    file = write(tmp_path)
    with pytest.raises(UserError) as refused:
        prepare([file], "auto", tmp_path / "out", min_user_events=1)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("days", [(0, 1), (1, 0)])
def test_days_in_milliseconds_join_in_the_order_of_their_times(tmp_path: Path, days: tuple[int, int]) -> None:
    rows = [
        [f"1,1,{START}100", f"1,2,{START}900", f"1,3,{START + 5}000"],
        [f"1,4,{START}500", f"1,2,{START}950"],
    ]
    files = [lines(f"day{day}.csv", HEADER, *rows[day])(tmp_path) for day in days]
    prepare(files[:1], "auto", tmp_path / "out", min_user_events=1)
    info = add_events(files[1:], tmp_path / "out")
    assert read(tmp_path / "out") == {1: [(1, START), (4, START), (2, START), (2, START), (3, START + 5)]}
    assert info["duplicate_rows"] == 0
