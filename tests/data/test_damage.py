"""Damaged training sets end in one line that names the file and the row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.data.dataset import PreparedDataset
from mme.errors import UserError
from tests.data.small_set import NUM_ITEMS, make_histories, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", make_histories())


def without_sums(folder: Path) -> None:
    """Makes a set of an older version, whose parts have no checksums."""
    info = json.loads((folder / "dataset.json").read_text())
    info.pop("files", None)
    for part in info["parts"]:
        part.pop("sha256", None)
    (folder / "dataset.json").write_text(json.dumps(info))


def rewrite(part: Path, **columns: object) -> None:
    table = pq.read_table(part)
    for name, value in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(value))
    pq.write_table(table, part)


def damage_item(folder: Path) -> None:
    items = pq.read_table(folder / "part-00000.parquet")["item_ids"].to_pylist()
    items[3][1] = NUM_ITEMS
    rewrite(folder / "part-00000.parquet", item_ids=items)


def damage_time(folder: Path) -> None:
    times = pq.read_table(folder / "part-00000.parquet")["timestamps"].to_pylist()
    times[4][2] = times[4][1] - 1
    rewrite(folder / "part-00000.parquet", timestamps=times)


def damage_null(folder: Path) -> None:
    times = pq.read_table(folder / "part-00000.parquet")["timestamps"].to_pylist()
    times[2][0] = None
    rewrite(folder / "part-00000.parquet", timestamps=times)


def damage_type(folder: Path) -> None:
    items = pq.read_table(folder / "part-00000.parquet")["item_ids"].to_pylist()
    rewrite(folder / "part-00000.parquet", item_ids=[[str(item) for item in row] for row in items])


def damage_length(folder: Path) -> None:
    items = pq.read_table(folder / "part-00000.parquet")["item_ids"].to_pylist()
    rewrite(folder / "part-00000.parquet", item_ids=[*items[:1], items[1][:-1], *items[2:]])


def truncate(folder: Path) -> None:
    part = folder / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:200])


def damage_part(folder: Path) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    del info["parts"][1]["events"]
    (folder / "dataset.json").write_text(json.dumps(info))


def add_user(folder: Path) -> None:
    table = pq.read_table(folder / "part-00001.parquet")
    pq.write_table(pa.concat_tables([table, table[:1]]), folder / "part-00001.parquet")


def add_event(folder: Path, change: int = 1) -> None:
    lists = pq.read_table(folder / "part-00001.parquet").to_pydict()
    for name in ("item_ids", "timestamps"):
        last = lists[name][-1]
        lists[name][-1] = last + last[-1:] if change > 0 else last[:-1]
    rewrite(folder / "part-00001.parquet", item_ids=lists["item_ids"], timestamps=lists["timestamps"])


def remove_event(folder: Path) -> None:
    add_event(folder, -1)


def damage_counts(folder: Path) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"num_events": 7}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_item, r"part-00000.parquet: row 3: item index 40, expected 0 to 39"),
        (damage_time, r"part-00000.parquet: row 4: timestamp \d+ follows \d+, expected no decrease"),
        (damage_null, r"part-00000.parquet: row 2: timestamps has a null"),
        (damage_type, r"part-00000.parquet: column 'item_ids' holds list<.*string>, expected list<int64>"),
        (damage_length, r"part-00000.parquet: row 1: timestamps and item_ids have different lengths"),
        (truncate, r"part-00001.parquet: not a readable Parquet file, perhaps truncated"),
        (lambda folder: (folder / "part-00001.parquet").unlink(), r"part-00001.parquet: no such file"),
        (lambda folder: (folder / "dataset.json").unlink(), r"dataset.json: no such file"),
        (lambda folder: (folder / "dataset.json").write_text("{"), r"dataset.json: Invalid JSON"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), r"dataset.json: name: Field required"),
        (damage_part, r"dataset.json: parts\[1\].events: Field required"),
        (add_user, r"part-00001.parquet: has \d+ rows, dataset.json says \d+"),
        (add_event, r"part-00001.parquet: has more events than dataset.json says \(\d+\)"),
        (remove_event, r"part-00001.parquet: has \d+ events, dataset.json says \d+"),
        (lambda folder: (folder / "items.parquet").unlink(), r"items.parquet: no such file"),
        (damage_counts, r"dataset.json: num_events is 7, but its parts add up to \d+"),
    ],
)
@pytest.mark.parametrize("opened_before", [False, True])
def test_damage_is_named_by_file_and_row(folder: Path, damage: object, message: str, opened_before: bool) -> None:
    without_sums(folder)
    if opened_before:  # the events are in the flat file by now
        PreparedDataset.open(folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        PreparedDataset.open(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        PreparedDataset.open(tmp_path / "nowhere")
