"""Training sets in a real S3 server: written whole or not at all, extended, copied to be read, and used by every command."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.job import items_of, require_dataset
from mme.cli import main
from mme.config import load_config
from mme.data.dataset import PreparedDataset
from mme.data.remote_set import local_folder, set_to_write
from mme.errors import UserError
from mme.prepare.pipeline import add_events, prepare
from mme.remote import RemoteFile
from tests.object_store import ObjectStore
from tests.trained import REPOSITORY, mme

SET = "s3://bucket/sets/mine"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write_log(path: Path, day: int) -> Path:
    rows = [f"{user},{user + item},{day * 86400 + item}\n" for user in range(1, 4) for item in range(4)]
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_remote_set_equals_a_local_one(tmp_path: Path, object_store: ObjectStore) -> None:
    logs = [write_log(tmp_path / f"{day}.csv", day) for day in (1, 2)]
    assert main(["prepare", "--input", str(logs[0]), "--output", f"{SET}/"]) == 0
    prepare([logs[0]], "auto", tmp_path / "mine")
    assert content(local_folder(SET)) == content(tmp_path / "mine")
    first = object_store.keys("sets")
    assert main(["prepare", str(logs[1]), "--add-to", SET]) == 0
    add_events([logs[1]], tmp_path / "mine")
    assert content(local_folder(SET, tmp_path / "copies")) == content(tmp_path / "mine")
    assert not set(first) & set(object_store.keys("sets")) - {"sets/mine/dataset.json"}
    assert {key.rpartition("/")[2] for key in object_store.keys("sets")} == set(content(tmp_path / "mine"))
    assert PreparedDataset.open(SET).num_events == 24


def test_a_copy_is_made_once_and_a_local_layout_is_read(
    tmp_path: Path, object_store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([write_log(tmp_path / "1.csv", 1)], "auto", tmp_path / "mine")
    for name, data in content(tmp_path / "mine").items():
        object_store.put(f"sets/mine/{name}", data)
    folder = local_folder(SET)
    assert content(folder) == content(tmp_path / "mine")
    assert capsys.readouterr().err == f"{SET}: copied to {folder}\n"
    assert local_folder(SET) == folder
    assert capsys.readouterr().err == ""
    assert main(["prepare", str(write_log(tmp_path / "2.csv", 2)), "--output", SET]) == 0
    assert all(key.startswith("sets/mine/objects-") for key in object_store.keys("sets")[1:])
    assert local_folder(SET) != folder


def test_a_copy_that_lost_files_is_made_again(tmp_path: Path, object_store: ObjectStore) -> None:
    prepare([write_log(tmp_path / "1.csv", 1)], "auto", SET)
    folder = local_folder(SET)
    whole = content(folder)
    for damage in (
        lambda: (folder / "part-00000.parquet").write_bytes(b"short"),
        lambda: (folder / "items.parquet").unlink(),
        lambda: (folder / "dataset.json").unlink(),
    ):
        damage()
        (folder.with_name(f".partial-{folder.name}")).mkdir()  # of a killed process
        assert local_folder(SET) == folder and content(folder) == whole
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_no_place_for_a_copy(tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = write_log(tmp_path / "1.csv", 1)
    prepare([log], "auto", SET)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match=r"^no home folder for copies of remote sets: expected HOME, XDG_CACHE_HOME or"):
        local_folder(SET)
    assert local_folder(SET, tmp_path / "copies").is_dir()
    before = object_store.keys("sets")
    monkeypatch.setattr(RemoteFile, "download", full)
    with pytest.raises(UserError, match=f"the copy of {SET} can't be written: No space left on device"):
        add_events([log], SET)
    assert object_store.keys("sets") == before


def test_a_failed_upload_leaves_the_older_set(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([write_log(tmp_path / "1.csv", 1)], "auto", SET)
    keys, older = object_store.keys(), content(local_folder(SET))
    upload = RemoteFile.upload

    def fail_at_items(self: RemoteFile, source: Path) -> None:
        if self.name == "part-00000.parquet":
            raise UserError(f"{self}: can't be used: connection lost")
        upload(self, source)

    monkeypatch.setattr(RemoteFile, "upload", fail_at_items)
    with pytest.raises(UserError, match="connection lost"):
        prepare([write_log(tmp_path / "2.csv", 2)], "auto", SET)
    assert object_store.keys() == keys
    assert content(local_folder(SET, tmp_path / "again")) == older


def test_an_interrupted_preparation_leaves_nothing(object_store: ObjectStore) -> None:
    with pytest.raises(KeyboardInterrupt), set_to_write(SET):
        raise KeyboardInterrupt
    assert object_store.keys() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket", "s3://bucket: expected a folder in an object store, such as s3://BUCKET/FOLDER"),
        ("s3://none/set", "s3://none/set/.mme-prepare: can't be used: "),
        ("hdfs://host:1/set", "hdfs://host:1/set: "),
        ("s3://bucket/other", "s3://bucket/other: holds other files (readme.md): expected a new folder, or one with only"),
        ("s3://bucket/other/readme.md/x/y", ""),
    ],
)  # fmt: skip
def test_what_can_not_be_written_to(
    tmp_path: Path, object_store: ObjectStore, capsys: pytest.CaptureFixture[str], url: str, message: str
) -> None:
    object_store.put("other/readme.md", b"x")
    status = main(["prepare", str(write_log(tmp_path / "1.csv", 1)), "--output", url])
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == ((2, 1) if message else (0, 0))
    assert err.startswith(f"error: {message}" if message else "")


def test_a_set_that_denies_access(
    tmp_path: Path, object_store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with object_store.checking_credentials():
        assert main(["prepare", str(write_log(tmp_path / "1.csv", 1)), "--output", SET]) == 2
    assert "access denied: expected credentials in the environment" in capsys.readouterr().err


def test_what_is_no_sound_set(tmp_path: Path, object_store: ObjectStore, own_cache: Path) -> None:
    with pytest.raises(UserError, match=f"^{SET}: no dataset.json: expected a training set"):
        PreparedDataset.open(SET)
    prepare([write_log(tmp_path / "1.csv", 1)], "auto", tmp_path / "mine")
    files = content(tmp_path / "mine")
    for name, data in files.items():
        object_store.put(f"sets/mine/{name}", data)
    part = files["part-00000.parquet"]
    object_store.put("sets/mine/part-00000.parquet", part[:40] + bytes([part[40] ^ 1]) + part[41:])
    with pytest.raises(UserError, match=f"^{SET}/part-00000.parquet: damaged: its SHA-256"):
        PreparedDataset.open(SET)
    object_store.delete("sets/mine/part-00000.parquet")
    with pytest.raises(UserError, match=f"^{SET}/part-00000.parquet: no such file"):
        PreparedDataset.open(SET)
    names = (b"../part-0", b"..", b"", b"\\u0000", b"\\n")
    of_names = [files["dataset.json"].replace(b"part-00000.parquet", name) for name in names]
    for damaged in (b"", b"[]", b"{}", *of_names):
        object_store.put("sets/mine/dataset.json", damaged)
        with pytest.raises(UserError, match=f"^{SET}/dataset.json: not the description of a training set"):
            PreparedDataset.open(SET)
    assert not any(path.is_file() for path in own_cache.rglob("*"))


def test_a_set_that_changes_while_it_is_copied(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([write_log(tmp_path / "1.csv", 1)], "auto", SET)
    download = RemoteFile.download

    def meddle(self: RemoteFile, target: Path) -> None:
        download(self, target)
        changed = json.loads(object_store.get("sets/mine/dataset.json")) | {"name": "another"}
        object_store.put("sets/mine/dataset.json", json.dumps(changed).encode())

    monkeypatch.setattr(RemoteFile, "download", meddle)
    with pytest.raises(UserError, match=f"^{SET}: changed while it was copied"):
        local_folder(SET)


def test_the_launcher_leaves_a_remote_set_to_the_workers() -> None:
    config = load_config(None, [f"data.path={SET}"])
    require_dataset(config)
    with pytest.raises(UserError, match=f"data.path: {SET}: a remote data set is not read here: give --items N"):
        items_of(config)


@pytest.mark.slow
def test_train_evaluate_and_recommend_on_a_remote_set(tmp_path: Path, object_store: ObjectStore) -> None:
    mme("prepare", "--synthetic", "quickstart", "--users", "60", "--items", "40", "--output", SET)
    config = REPOSITORY / "configs" / "quickstart.yaml"
    small = [
        "model.embedding_dim=16",
        "model.num_blocks=1",
        "model.num_heads=1",
        "model.moe.num_experts=0",
        "model.moe.placement=[0]",
    ]
    mme("train", "--config", config, f"data.path={SET}", f"output_dir={tmp_path / 'run'}", "train.steps=2", *small)
    found = json.loads(mme("evaluate", "--run", tmp_path / "run").stdout)
    users = {"user_id": ["x"], "item_ids": [[1, 2, 3]], "timestamps": [[1_700_100_000, 1_700_200_000, 1_700_300_000]]}
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    paths = ["--run", tmp_path / "run", "--users", tmp_path / "users.parquet", "--output", tmp_path / "r.parquet"]
    mme("recommend", *paths, "--top-k", "3")
    assert 0 < found["hr@50"] <= 1
    assert [len(row) for row in pq.read_table(tmp_path / "r.parquet")["item_ids"].to_pylist()] == [3]
