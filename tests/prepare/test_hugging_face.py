"""Folders that Hugging Face's `datasets` writes are read as what they are: Arrow of `save_to_disk`, Parquet of the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from mme.cli import main
from mme.errors import UserError
from mme.prepare import readers
from mme.prepare.pipeline import prepare
from tests.object_store import ObjectStore

LOG = pa.table(
    {
        "session": pa.array([[1, 2]] * 40),
        "user_id": pa.array([row % 8 for row in range(40)], pa.int32()),
        "item_id": pa.array([f"i{row * 7 % 11}" for row in range(40)], pa.large_string()),
        "timestamp": pa.array([1_600_000_000 + row for row in range(40)], pa.timestamp("s")),
    }
)


def write_arrow(path: Path, table: pa.Table, writer: Callable[..., Any] = pa.ipc.new_stream) -> None:
    with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)


def save_to_disk(folder: Path, table: pa.Table, shards: int) -> Path:
    """The layout of `Dataset.save_to_disk` (datasets 5.2)."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    rows = -(-table.num_rows // shards)
    for number, name in enumerate(names):
        write_arrow(folder / name, table.slice(number * rows, rows))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    write_arrow(folder / "cache-0123456789abcdef.arrow", table.slice(0, 5))
    return folder


def parts(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.parquet"))]


@pytest.fixture
def expected(tmp_path: Path) -> list[bytes]:
    pq.write_table(LOG, tmp_path / "log.parquet")
    prepare([tmp_path / "log.parquet"], "auto", tmp_path / "expected")
    return parts(tmp_path / "expected")


@pytest.mark.parametrize("rows_at_once", [4, 1 << 18])
def test_a_folder_of_save_to_disk(
    tmp_path: Path,
    expected: list[bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows_at_once: int,
) -> None:
    monkeypatch.setattr(readers, "PARQUET_ROWS", rows_at_once)
    folder = save_to_disk(tmp_path / "saved", LOG, 3)
    assert main(["prepare", "--input", str(folder), "--output", str(tmp_path / "set")]) == 0
    assert parts(tmp_path / "set") == expected
    out = capsys.readouterr().out
    assert out.startswith(f"{folder / 'data-00000-of-00003.arrow'} and 2 more files: Arrow\n  user: column user_id")


def test_splits_form_one_log_or_one_is_given(tmp_path: Path, expected: list[bytes]) -> None:
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    save_to_disk(tmp_path / "dict" / "test", LOG.slice(0, 8), 1)
    train = save_to_disk(tmp_path / "dict" / "train", LOG.slice(8), 2)
    prepare([tmp_path / "dict"], "auto", tmp_path / "set")
    assert parts(tmp_path / "set") == expected
    assert prepare([train], "arrow", tmp_path / "set")["rows_read"] == 32


def test_a_folder_of_the_hub(tmp_path: Path, expected: list[bytes]) -> None:
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")
    (folder / "dataset_infos.json").write_text("{}")
    pq.write_table(LOG.slice(0, 9), folder / "data" / "train-00000-of-00002.parquet")
    pq.write_table(LOG.slice(9), folder / "data" / "train-00001-of-00002.parquet")
    prepare([folder], "auto", tmp_path / "set")
    assert parts(tmp_path / "set") == expected


def test_csv_of_the_hub_is_the_log_and_its_description_is_not(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "hub" / "train.csv").write_text("user_id,item_id,timestamp\n1,5,1\n1,6,2\n1,7,3\n")
    assert prepare([tmp_path / "hub"], "auto", tmp_path / "set")["rows_read"] == 3


def test_arrow_files_local_and_remote(tmp_path: Path, expected: list[bytes], object_store: ObjectStore) -> None:
    write_arrow(tmp_path / "log.arrow", LOG, pa.ipc.new_file)
    prepare([tmp_path / "log.arrow"], "auto", tmp_path / "set")
    assert parts(tmp_path / "set") == expected
    for path in save_to_disk(tmp_path / "saved", LOG, 2).iterdir():
        object_store.put(f"saved/{path.name}", path.read_bytes())
    prepare(["s3://bucket/saved"], "auto", tmp_path / "set")
    assert parts(tmp_path / "set") == expected
    object_store.delete("saved/data-00001-of-00002.arrow")
    with pytest.raises(
        UserError, match=r"^s3://bucket/saved/state.json: names data-00001-of-00002.arrow, but there is"
    ):
        prepare(["s3://bucket/saved"], "auto", tmp_path / "set")


def test_a_shard_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", LOG, 3)
    shard = folder / "data-00001-of-00003.arrow"
    data = shard.read_bytes()
    # The second is cut off between two batches; the last 8 bytes are the mark of the end.
    for rest in (data[: len(data) // 2], data[:-8], data[:5]):
        shard.write_bytes(rest)
        with pytest.raises(UserError, match=r"data-00001-of-00003.arrow: not a readable Arrow file, perhaps truncated"):
            prepare([folder], "auto", tmp_path / "set")
    shard.unlink()
    with pytest.raises(
        UserError, match=r"state.json: names data-00001-of-00003.arrow, but there is no such file: expected"
    ):
        prepare([folder], "auto", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_other_files_are_not_taken_for_arrow(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,5,1\n")
    with pytest.raises(UserError, match=r"log.csv: not a readable Arrow file"):
        prepare([tmp_path / "log.csv"], "arrow", tmp_path / "set")
    write_arrow(tmp_path / "log.arrow", LOG)
    with pytest.raises(UserError, match=r"log.arrow: is an Arrow or Parquet file, expected csv"):
        prepare([tmp_path / "log.arrow"], "csv", tmp_path / "set")
    write_arrow(tmp_path / "log.arrow", LOG.rename_columns(["timestamp", "user_id", "item_id", "x"]))
    with pytest.raises(UserError, match=r"log.arrow: column 'timestamp' holds list"):
        prepare([tmp_path / "log.arrow"], "auto", tmp_path / "set")


def test_views_of_polars_are_text(tmp_path: Path, expected: list[bytes]) -> None:
    items = LOG["item_id"].cast(pa.string_view())
    write_arrow(tmp_path / "log.arrow", LOG.set_column(2, "item_id", items))
    prepare([tmp_path / "log.arrow"], "auto", tmp_path / "set")
    assert parts(tmp_path / "set") == expected
    prepare([tmp_path / "log.arrow"], "auto", tmp_path / "set", feature_columns=["item_id"])
    assert pq.read_metadata(tmp_path / "set" / "features.parquet").num_rows == 11


def test_state_json_decides_only_about_arrow_files(tmp_path: Path, expected: list[bytes]) -> None:
    folder = save_to_disk(tmp_path / "saved", LOG, 2)
    pq.write_table(LOG, folder / "all.parquet")
    prepare([folder], "auto", tmp_path / "set")
    assert parts(tmp_path / "set") == expected
    (folder / "state.json").write_text("[" * 100_000)
    prepare([folder], "arrow", tmp_path / "set")
    assert parts(tmp_path / "set") == expected
    (folder / "state.json").write_text('{"_data_files": [{"filename": "cache-0123456789abcdef.arrow"}]}')
    with pytest.raises(UserError, match=r"names cache-0123456789abcdef.arrow, which is hidden or a cache: expected"):
        prepare([folder], "arrow", tmp_path / "set")
