"""Files become a training set with the right order, filters and counts; bad input leaves nothing half-written."""

from __future__ import annotations

import datetime
import errno
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.data.dataset import PreparedDataset
from mme.data.split import Split
from mme.errors import UserError
from mme.prepare import event_store
from mme.prepare import writer as writer_module
from mme.prepare.pipeline import prepare

SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(folder: Path) -> dict[Any, list[tuple[Any, int]]]:
    """User → (raw item, timestamp) in order; the folder also passes the checks of the reader."""
    dataset = PreparedDataset.open(folder)
    catalogue = pq.read_table(folder / "items.parquet").sort_by("item_index")["item_id"].to_pylist()
    found = {}
    for part in dataset.info["parts"]:
        for row in pq.read_table(folder / part["file"]).to_pylist():
            assert row["user_id"] not in found
            items = [catalogue[index] for index in row["item_ids"]]
            found[row["user_id"]] = list(zip(items, row["timestamps"], strict=True))
    return found


def write_csv(path: Path, rows: list[str], header: str | None = "user_id,item_id,timestamp") -> Path:
    path.write_text("".join(f"{line}\n" for line in ([header] if header else []) + rows))
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_matches_a_plain_program_on_random_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_store, "EVENTS_AT_ONCE", 100)  # users extend over several batches
    monkeypatch.setattr(writer_module.DatasetWriter.__init__, "__defaults__", (500,))
    rng = np.random.default_rng(0)
    users, items, times = rng.integers(60, size=3000), rng.integers(200, size=3000), rng.integers(40, size=3000)
    half = write_parquet(tmp_path / "a.parquet", user_id=users[:1500], item_id=items[:1500], timestamp=times[:1500])
    rest = write_csv(
        tmp_path / "b.csv", [f"{u},{i},{t}" for u, i, t in zip(users[1500:], items[1500:], times[1500:], strict=True)]
    )
    info = prepare([half, rest], "auto", tmp_path / "out", min_user_events=42, min_item_events=9)

    events = list(dict.fromkeys(zip(users.tolist(), items.tolist(), times.tolist(), strict=True)))
    assert info["duplicate_rows"] == 3000 - len(events)
    while True:
        by_user, by_item = Counter(e[0] for e in events), Counter(e[1] for e in events)
        kept = [e for e in events if by_user[e[0]] >= 42 and by_item[e[1]] >= 9]
        if len(kept) == len(events):
            break
        events = kept
    expected = defaultdict(list)
    for user, item, time in sorted(events, key=lambda event: event[2]):  # stable
        expected[user].append((item, time))
    assert len(info["parts"]) > 2
    assert 0 < info["users_dropped"] < 60
    assert read(tmp_path / "out") == dict(expected)
    assert info["num_events"] == len(events) and info["num_users"] == len(expected)
    counts = pq.read_table(tmp_path / "out" / "items.parquet")["count"].to_pylist()
    assert sorted(counts) == sorted(Counter(e[1] for e in events).values())


def test_equal_times_keep_the_order_of_rows_and_files(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "1.csv", ["1,9,5", "1,3,5", "1,9,5", "1,7,4"])
    second = write_csv(tmp_path / "2.csv", ["1,1,5", "1,8,5"])
    info = prepare([first, second], "csv", tmp_path / "out")
    assert read(tmp_path / "out") == {1: [(7, 4), (9, 5), (3, 5), (1, 5), (8, 5)]}
    assert info["duplicate_rows"] == 1 and info["sort_rule"] == "stable by (timestamp, original row)"


def test_malformed_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [f"{user},{item},{user + item}" for user in range(10) for item in range(10)]
    bad = ["nan,1,5", "3,,5", "3,4,-5", "3,4,1e12", "3,4,noon", "1,2", "3,x7,5", "3,7.5,5", "3,4,"]
    file = write_csv(tmp_path / "a.csv", good[:50] + bad + good[50:])
    info = prepare([file], "csv", tmp_path / "out", max_malformed_share=0.1)
    assert info["rows_read"] == 109 and info["malformed_rows"] == 9 and info["num_events"] == 100
    assert {reason: entry["rows"] for reason, entry in info["malformed"].items()} == {
        "no value in user_id": 1,
        "no value in item_id": 1,
        "negative time in timestamp": 1,
        "time out of range in timestamp": 1,
        "not a time in timestamp": 1,
        "not a whole number in item_id": 2,
        "no value in timestamp": 1,
        "wrong number of fields": 1,
    }
    assert info["malformed"]["no value in user_id"]["first"] == ["a.csv line 52"]
    assert info["malformed"]["wrong number of fields"]["first"] == ["a.csv line 57"]
    assert info["malformed"]["not a whole number in item_id"]["first"] == [
        "a.csv line 58: 'x7'",
        "a.csv line 59: '7.5'",
    ]
    with pytest.raises(UserError, match=r"a.csv: 9 of 109 rows are malformed.*--max-malformed-share.*a.csv line 52"):
        prepare([file], "csv", tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_parquet_floats_with_nan_and_timestamps(tmp_path: Path) -> None:
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    file = write_parquet(
        tmp_path / "a.parquet",
        uid=[1.0, 1.0, float("nan"), 1.0, 1.5],
        item_id=[4, 5, 6, 7, 8],
        event_time=[start + datetime.timedelta(seconds=s) for s in (3, 1, 2, 2, 9)],
    )
    info = prepare([file], "parquet", tmp_path / "out", max_malformed_share=0.5)
    zero = int(start.timestamp())
    assert read(tmp_path / "out") == {1: [(5, zero + 1), (7, zero + 2), (4, zero + 3)]}
    assert info["malformed"]["no value in uid"] == {"rows": 1, "first": ["a.parquet row 2: 'nan'"]}
    assert info["malformed"]["not a whole number in uid"] == {"rows": 1, "first": ["a.parquet row 4: '1.5'"]}


def test_columns_by_name_separator_and_text_ids(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.tsv", ["ann\tx1\t3", "ann\tx0\t2", "ann\t7\t1"], "who\twhat\twhen")
    prepare([file], "csv", tmp_path / "out", columns={"user": "who", "item": "what", "timestamp": "when"})
    assert read(tmp_path / "out") == {"ann": [("7", 1), ("x0", 2), ("x1", 3)]}


def empty_file(folder: Path) -> Path:
    (folder / "a.csv").touch()
    return folder / "a.csv"


def truncated_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "a.parquet", user_id=[1] * 99, item_id=[2] * 99, timestamp=[3] * 99)
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (lambda folder: folder / "a.csv", "csv", r"a.csv: no such file"),
        (empty_file, "csv", r"a.csv: empty file"),
        (lambda folder: write_csv(folder / "a.csv", []), "csv", r"a.csv: no rows"),
        (
            lambda folder: write_csv(folder / "a.csv", ["1,2,3"], "userId,movieId,rating"),
            "csv",
            r"a.csv: no column 'timestamp' \(found: userId, movieId, rating\)",
        ),
        (
            lambda folder: write_csv(folder / "a.csv", ["1,2,3"]),
            "kuairand",
            r"a.csv: no column 'video_id' \(found: user_id, item_id, timestamp\)",
        ),
        (
            lambda folder: write_csv(folder / "a.csv", ["1,2,noon"]),
            "csv",
            r"a.csv: line 2: column 'timestamp' holds 'noon', expected a time: ",
        ),
        (
            lambda folder: write_parquet(folder / "a.parquet", user_id=[[1]], item_id=[1], timestamp=[1]),
            "parquet",
            r"a.parquet: column 'user_id' holds list<.*>, expected ids \(integer or text\)",
        ),
        (
            lambda folder: write_parquet(folder / "a.parquet", user_id=[1], item_id=[1], timestamp=[True]),
            "parquet",
            r"a.parquet: column 'timestamp' holds bool, expected a time: ",
        ),
        (truncated_parquet, "parquet", r"a.parquet: not a readable Parquet file, perhaps truncated"),
        (lambda folder: write_csv(folder / "a.csv", ["1,2,3"]), "parquet", r"a.csv: not a readable Parquet file"),
        (
            lambda folder: write_csv(folder / "a.csv", ["1,2,3"]),
            "movielens-1m",
            r"a.csv: line 1: .* expected user::item",
        ),
        (
            lambda folder: write_csv(folder / "a.csv", ["1,2,3"]),
            "xml",
            r"--format xml: expected one of parquet, arrow, csv",
        ),
        (
            lambda folder: write_csv(folder / "a.csv", ["1,2,3", "1,4,5"]),
            "csv",
            r"a.csv: nothing is left of 1 users and 2 items: none has --min-user-events 3",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, make: Any, format: str, message: str) -> None:
    file = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as raised:
        prepare([file], format, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("limit", ["lots", "4", "1MiB"])
def test_memory_limit_must_be_a_size(tmp_path: Path, limit: str) -> None:
    file = write_csv(tmp_path / "a.csv", ["1,2,3"])
    with pytest.raises(UserError, match=f"--memory-limit {limit}: expected"):
        prepare([file], "csv", tmp_path / "out", memory_limit=limit)


def test_no_space_keeps_the_older_set_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_csv(tmp_path / "a.csv", ["1,2,3", "1,4,5", "1,6,7"])
    prepare([file], "csv", tmp_path / "out")

    def no_space(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.pq, "write_table", no_space)
        with pytest.raises(UserError, match=r"out: can't be written: No space left on device; nothing was written"):
            prepare([file], "csv", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out"]
    assert read(tmp_path / "out") == {1: [(2, 3), (4, 5), (6, 7)]}


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ["1,2,3", "1,4,5", "1,6,7"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    for name in ("some.json", "dataset.json"):  # also a training set with other files in it
        (tmp_path / "out" / name).write_text("{}")
        with pytest.raises(UserError, match=r"out: holds other files \((some.json|thesis.txt)\)"):
            prepare([file], "csv", tmp_path / "out")
        assert (tmp_path / "out" / "thesis.txt").read_text() == "x"


def test_a_link_to_a_set_stays_one_and_nothing_of_the_older_set_stays(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ["1,2,3", "1,4,5", "1,6,7", "2,2,1"])  # the second user is left out
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    prepare([file], "csv", tmp_path / "out")
    for _ in range(2):
        prepare([write_csv(tmp_path / "b.csv", ["1,2,3", "1,4,5", "1,6,8"])], "csv", tmp_path / "out")
        assert (tmp_path / "out").is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
        assert read(tmp_path / "out") == {1: [(2, 3), (4, 5), (6, 8)]}
    assert not (tmp_path / "out" / "left_out.parquet").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, real interactions beside the checkout")
def test_movielens_csv_and_parquet_give_the_same_targets(tmp_path: Path) -> None:
    hashes = []
    for file, format in [("ml-latest-small.ratings.csv", "auto"), ("ml-latest-small.parquet", "parquet")]:
        info = prepare([SHARED / file], format, tmp_path / format)
        assert (info["num_users"], info["num_items"], info["num_events"]) == (610, 9724, 100_836)
        assert (info["users_dropped"], info["malformed_rows"]) == (1, 0)  # user 999 has one event
        assert re.fullmatch("[0-9a-f]{64}", info["source"]["files"][0]["sha256"])
        assert json.loads((tmp_path / format / "dataset.json").read_text()) == info
        hashes.append(PreparedDataset.open(tmp_path / format).targets_sha256(Split("leave_one_out"), "test"))
    assert hashes[0] == hashes[1]
