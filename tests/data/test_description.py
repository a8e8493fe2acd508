"""Damaged and malicious data sets are detected before they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.data.dataset import PreparedDataset
from mme.data.description import content_sha256, read_info
from mme.data.split import Split
from mme.errors import UserError
from mme.prepare.synthetic import prepare_synthetic


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare_synthetic("quickstart", tmp_path / "set", users=60, items=40, seed=3)
    return tmp_path / "set"


def in_info(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        info = json.loads((folder / "dataset.json").read_text())
        change(info)
        (folder / "dataset.json").write_text(json.dumps(info))

    return tamper


def one_other_event(folder: Path) -> None:
    """Another valid item, which only the checksum detects."""
    path = folder / "part-00000.parquet"
    table = pq.read_table(path)
    items = table["item_ids"].to_pylist()
    items[0][0] = (items[0][0] + 1) % 40
    pq.write_table(table.set_column(1, "item_ids", pa.array(items, pa.list_(pa.int64()))), path)


def two_items_exchanged(folder: Path) -> None:
    path = folder / "items.parquet"
    table = pq.read_table(path)
    ids = table["item_id"].to_pylist()
    pq.write_table(table.set_column(1, "item_id", pa.array([ids[1], ids[0], *ids[2:]])), path)


def bomb(folder: Path) -> None:
    """A few kilobytes that decompress to 40 million events of one user."""
    path, count = folder / "part-00000.parquet", 40_000_000
    info = json.loads((folder / "dataset.json").read_text())
    users, bounds = info["parts"][0]["users"], pa.array([0, count], pa.int32())
    zeros = pa.ListArray.from_arrays(bounds, pa.array(np.zeros(count, np.int8)))
    few = pa.array([[0]] * (users - 1), pa.list_(pa.int8()))
    lists = pa.chunked_array([zeros, few])
    pq.write_table(
        pa.table({"user_id": [*map(str, range(users))], "item_ids": lists, "timestamps": lists}),
        path,
        compression="zstd",
        row_group_size=users,
    )
    assert path.stat().st_size < 100_000
    in_info(lambda info: info["parts"][0].pop("sha256"))(folder)


def link(name: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return tamper


def pipe(folder: Path) -> None:
    (folder / "dataset.json").unlink()
    os.mkfifo(folder / "dataset.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_other_event, r"part-00000.parquet: damaged: its SHA-256 is not the one in dataset.json"),
        (two_items_exchanged, r"items.parquet: damaged: its SHA-256 is not the one in dataset.json"),
        (bomb, r"part-00000.parquet: item_ids has more events than dataset.json says \(\d+\)"),
        (
            in_info(lambda info: info.update(num_items=10**8)),
            r"items.parquet: has 40 rows, dataset.json says 100000000",
        ),
        (
            in_info(lambda info: (info.update(num_users=10**9), info["parts"][0].update(users=10**9))),
            r"part-00000.parquet: has 60 rows, dataset.json says 1000000000",
        ),
        (in_info(lambda info: info.update(num_items=10**12)), r"dataset.json: num_items: Input should be less than"),
        (in_info(lambda info: info.update(num_events=-1)), r"dataset.json: num_events: Input should be greater than"),
        (in_info(lambda info: info.update(num_users="9")), r"dataset.json: num_users: Input should be a valid integer"),
        (in_info(lambda info: info["parts"].append(7)), r"dataset.json: parts\[1\]: Input should be an object"),
        (
            in_info(lambda info: info["parts"][0].update(file="../mine.parquet")),
            r"dataset.json: parts\[0\].file: '../mine.parquet' is not in this folder",
        ),
        (
            link("part-00000.parquet"),
            r"part-00000.parquet: not a readable .* \(a symbolic link, which is not followed here\)",
        ),
        (link("items.parquet"), r"items.parquet: a symbolic link, which is not followed here"),
        (link("dataset.json"), r"dataset.json: a symbolic link, which is not followed here"),
        (pipe, r"dataset.json: not a regular file"),
        (lambda folder: (folder / "dataset.json").write_text("[" * 100_000), r"dataset.json: Invalid JSON"),
        (lambda folder: (folder / "dataset.json").write_bytes(b'{"\xff'), r"dataset.json: byte 2 is not UTF-8"),
    ],
)
def test_damage_is_detected_before_use(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as found:
        PreparedDataset.open(folder)
    assert "\n" not in str(found.value)
    assert not list(folder.glob(".cache/*.events"))


def test_every_file_has_a_checksum_and_older_sets_without_are_read(folder: Path) -> None:
    info = read_info(folder)
    assert [sorted(part) for part in info["parts"]] == [["bytes", "events", "file", "sha256", "users"]]
    assert info["files"].keys() == {"items.parquet"}
    counts = PreparedDataset.open(folder).training_counts(Split("leave_two_out", 0.1))
    in_info(lambda info: (info.pop("files"), info["parts"][0].pop("sha256"), info["parts"][0].pop("bytes")))(folder)
    older = PreparedDataset.open(folder)
    assert (older.training_counts(Split("leave_two_out", 0.1)) == counts).all()
    # A checkpoint identifies its training set by this hash.
    assert older.sha256 == content_sha256(info)
    assert content_sha256(info | {"num_events": 1}) != content_sha256(info)


def test_a_link_to_the_cache_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old.events").write_text("mine")
    (folder / ".cache").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"\.cache: cannot be written: a symbolic link"):
        PreparedDataset.open(folder)
    (folder / ".cache").unlink()
    (folder / ".cache").mkdir()
    for name in ("lock", "x.events", "x.events.partial"):
        (folder / ".cache" / name).symlink_to(tmp_path / "mine" / "old.events")
    with pytest.raises(UserError, match=r"cannot be written: a symbolic link"):
        PreparedDataset.open(folder)
    (folder / ".cache" / "lock").unlink()
    PreparedDataset.open(folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["old.events"]
    assert (tmp_path / "mine" / "old.events").read_text() == "mine"


def test_links_that_the_user_gives_for_set_and_cache_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "cache").symlink_to(tmp_path / "mine")
    PreparedDataset.open(tmp_path / "linked")
    PreparedDataset.open(tmp_path / "linked", tmp_path / "cache")
    assert len(list((tmp_path / "mine").glob("linked-*.events"))) == 1
