"""`mme prepare --input s3://…` against a real S3 server: the same set as of local files, or one line and nothing written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mme.cli import main
from mme.errors import UserError
from mme.prepare.pipeline import prepare
from mme.remote import RemoteFile, RemotePath
from tests.object_store import ObjectStore


def log(day: int) -> pa.Table:
    users, items = np.repeat(np.arange(5), 6), np.tile(np.arange(6), 5)
    return pa.table({"user_id": users, "item_id": items + users, "timestamp": 1_600_000_000 + day * 86400 + items})


def as_csv(day: int) -> bytes:
    rows = zip(*log(day).to_pydict().values(), strict=True)
    return b"user_id,item_id,timestamp\n" + b"".join(b"%d,%d,%d\n" % row for row in rows)


def as_parquet(day: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(log(day), sink)
    return sink.getvalue().to_pybytes()


def parts(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.parquet"))]


@pytest.mark.parametrize(
    ("files", "given"),
    [
        ({"log.csv": as_csv(0)}, "log.csv"),
        ({"log.csv.gz": gzip.compress(as_csv(0), mtime=0)}, "log.csv.gz"),
        ({"a/2.parquet": as_parquet(1), "a/1.parquet": as_parquet(0), "a/_SUCCESS": b"", "a/.x.parquet": b"x"}, "a"),
        ({"d/day-1.csv": as_csv(0), "d/day-2.csv": as_csv(1), "d/other.csv": b"no log"}, "d/day-*.csv"),
        ({"y/01/x.csv": as_csv(0), "y/02/x.csv": as_csv(1), "y/02/z.csv": b"no log"}, "y/**/x.csv"),
    ],
)
def test_a_remote_log_gives_the_same_set(
    tmp_path: Path,
    object_store: ObjectStore,
    files: dict[str, bytes],
    given: str,
) -> None:
    for key, data in files.items():
        object_store.put(f"logs/{key}", data)
        (tmp_path / "local" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / key).write_bytes(data)
    assert main(["prepare", "--input", f"s3://bucket/logs/{given}", "--output", str(tmp_path / "remote" / "set")]) == 0
    prepare([tmp_path / "local" / given], "auto", tmp_path / "set")
    assert parts(tmp_path / "remote" / "set") == parts(tmp_path / "set")
    infos = [json.loads((folder / "set" / "dataset.json").read_text()) for folder in (tmp_path / "remote", tmp_path)]
    assert infos[0] == infos[1]


def test_remote_days_are_added(tmp_path: Path, object_store: ObjectStore) -> None:
    first, second = object_store.put("1.csv", as_csv(0)), object_store.put("2.parquet", as_parquet(1))
    assert main(["prepare", first, "--output", str(tmp_path / "set")]) == 0
    assert main(["prepare", second, "--add-to", str(tmp_path / "set")]) == 0
    prepare([first, second], "auto", tmp_path / "whole")
    assert parts(tmp_path / "set")[1:] == parts(tmp_path / "whole")[1:]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/none.csv", "s3://bucket/none.csv: no such file"),
        ("s3://other/none.csv", "s3://other/none.csv: no such file"),
        ("s3://bucket/none-*.csv", "s3://bucket/none-*.csv: no file matches"),
        ("s3://bucket/empty.csv", "s3://bucket/empty.csv: empty file: expected interactions"),
        ("s3://bucket/folder", "s3://bucket/folder: no file of interactions in this folder, expected ratings.dat, "),
        ("s3:///log.csv", "s3://log.csv: no such file"),
        ("s3://key:word@bucket/x.csv", "s3://…@bucket/x.csv: credentials in a URL end up in logs: expected them in the "),
        ("s3://bucket/a\nb", "'s3://bucket/a\\nb': expected a URL without control characters"),
        ("s3://bucket/damaged.parquet", "s3://bucket/damaged.parquet: not a readable Parquet file, perhaps truncated"),
        ("http://host/log.csv", "http://host/log.csv: http:// is not supported: expected a path in a mounted file system"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    object_store: ObjectStore,
    url: str,
    message: str,
) -> None:
    object_store.put("empty.csv", b"")
    object_store.put("folder/readme.md", b"x")
    object_store.put("damaged.parquet", as_parquet(0)[:-9])
    assert main(["prepare", "--input", url, "--output", str(tmp_path / "set")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_denies_access_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    object_store: ObjectStore,
) -> None:
    url = object_store.put("log.csv", as_csv(0))
    message = f"error: {url}: access denied: expected credentials in the environment that may use it ("
    with object_store.checking_credentials():
        assert main(["prepare", url, "--output", str(tmp_path / "set")]) == 2
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert main(["prepare", url, "--output", str(tmp_path / "set")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(message) for line in lines] == [True, True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "127.0.0.1", "ftp://host"])
def test_a_store_that_does_not_answer_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    object_store: ObjectStore,
    endpoint: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert main(["prepare", "s3://bucket/x.csv", "--output", str(tmp_path / "set")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: s3://bucket/x.csv: can't be used: ") and err.count("\n") == 1


@pytest.mark.parametrize("form", [as_csv, as_parquet])
@pytest.mark.parametrize("change", ["delete", "replace", "same size"])
def test_an_object_that_changes_during_the_reading_is_noticed(
    tmp_path: Path,
    object_store: ObjectStore,
    form: Any,
    change: str,
) -> None:
    """The files have been examined, but not yet read, when `tell` is called."""
    url = object_store.put("log", form(0))

    def meddle(_: str) -> None:
        if change == "delete":
            object_store.delete("log")
        else:
            object_store.put("log", form(1)[:-1] if change == "replace" else form(1))

    expected = "vanished" if change == "delete" else "changed"
    with pytest.raises(UserError, match=f"^{url}: {expected} while it was read"):
        prepare([url], "auto", tmp_path / "set", tell=meddle)
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_changes_while_it_is_open_is_noticed(object_store: ObjectStore) -> None:
    file = RemoteFile.at(RemotePath.parse(object_store.put("log.csv", as_csv(0))))
    with pytest.raises(UserError, match=r"log\.csv: changed while it was read"), file.open() as stream:
        assert stream.read(4) == b"user"
        object_store.put("log.csv", as_csv(1))
    with (
        pytest.raises(UserError, match=r"log\.csv: changed while it was read"),
        file.open(random_access=True),
    ):
        pass


def test_other_stores_are_opened_or_name_what_they_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """HDFS needs a Java client, which this machine lacks."""
    assert main(["prepare", "hdfs://localhost:1/log.csv", "--output", str(tmp_path / "set")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: hdfs://localhost:1/log.csv: can't be used: ") and err.count("\n") == 1
    assert RemotePath.parse("gs://bucket/a/b.csv").path == "bucket/a/b.csv"
    assert RemotePath.parse("abfs://container@account.dfs.core.windows.net/a/b.csv").path == "container/a/b.csv"
