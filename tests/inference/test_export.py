"""Exports equal the model bit for bit, and damaged ones are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, load_file, save_file

import mme
from mme.cli import main
from mme.errors import UserError
from mme.inference.exported import with_sum
from mme.inference.program import padded_inputs, sample_requests
from tests.trained import Trained, train_small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_small(tmp_path_factory.mktemp("export"))


def export(trained: Trained, what: str, output: Path, *more: str) -> int:
    return main(["export", "--run", str(trained.run), "--what", what, "--output", str(output), *more])


def test_exported_weights_equal_the_run(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "model.safetensors"
    assert export(trained, "weights", output) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((tmp_path / "deep" / "model.safetensors.manifest.json").read_text())
    assert manifest["largest_difference"] == 0 and "decoder/blocks.0.uvqk" in manifest["tensors"]
    assert not any("exp_avg" in name for name in load_file(output))
    run, exported = mme.load(trained.run, device="cpu"), mme.load(output, device="cpu")
    users = trained.users()
    assert exported.recommend(users, k=9).equals(run.recommend(users, k=9))
    assert exported.name == run.name and exported.knowledge.times == run.knowledge.times
    again = tmp_path / "again.safetensors"
    assert main(["export", "--run", str(output), "--what", "weights", "--output", str(again)]) == 0
    assert mme.load(again, device="cpu").recommend(users, k=9).equals(run.recommend(users, k=9))


def test_vectors_by_raw_id(trained: Trained, tmp_path: Path) -> None:
    model = mme.load(trained.run, device="cpu")
    assert export(trained, "items", tmp_path / "items.parquet") == 0
    assert export(trained, "users", tmp_path / "users.parquet") == 0
    items, users = pq.read_table(tmp_path / "items.parquet"), pq.read_table(tmp_path / "users.parquet")
    assert items["item_id"].combine_chunks().equals(model.item_ids)
    np.testing.assert_array_equal(np.stack(items["vector"].to_numpy()), model.item_embeddings())
    given = trained.users()
    assert users["user_id"].to_pylist() == given["user_id"].to_pylist()
    np.testing.assert_allclose(np.stack(users["vector"].to_numpy()), model.user_embeddings(given), atol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_an_index_finds_the_same_lists(trained: Trained, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "items.faiss"
    assert export(trained, "index", path, "--exact" if kind == "exact" else "--no-exact") == 0
    manifest = json.loads((tmp_path / "items.faiss.manifest.json").read_text())
    assert manifest["kind"] == kind and manifest["recall@10"] > 0.95
    model = mme.load(trained.run, device="cpu")
    users = trained.users().slice(0, 8)
    _, rows = faiss.read_index(str(path)).search(model.user_embeddings(users), 5)
    ids = pq.read_table(tmp_path / "items.faiss.items.parquet")["item_id"].to_pylist()
    expected = model.recommend(users, k=5, exclude_seen=False)["item_ids"].to_pylist()
    found = [[ids[row] for row in each] for each in rows]
    assert (
        found == expected
        if kind == "exact"
        else np.mean([len(set(a) & set(b)) for a, b in zip(found, expected, strict=True)]) > 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "compiled"])
def test_the_exported_encoder_gives_the_states_of_the_model(trained: Trained, tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.pt2"
    assert export(trained, what, path) == 0
    manifest = json.loads((tmp_path / "model.pt2.manifest.json").read_text())
    assert manifest["largest_difference"] < 1e-5 and manifest["inputs"] == ["items", "lengths", "timestamps"]
    model = mme.load(trained.run, device="cpu")
    requests = sample_requests(model, np.array([1, 7, 32, 5]))
    program: Any = torch.export.load(path).module() if what == "model" else torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        states = program(**padded_inputs(requests, model.config)).numpy()
    np.testing.assert_allclose(states, model.encode(requests).numpy(), rtol=0, atol=1e-5)
    items = pq.read_table(f"{path}.items.parquet")
    assert items["item_id"].combine_chunks().equals(model.item_ids)
    np.testing.assert_array_equal(np.stack(items["vector"].to_numpy()), model.item_embeddings())


def test_an_encoder_needs_a_name_that_its_runtime_reads(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(trained, "model", tmp_path / "model.bin") == 2
    assert "expected a name that ends in .pt2" in capsys.readouterr().err


def test_a_damaged_export_is_refused_in_one_line(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert export(trained, "weights", path) == 0
    whole = path.read_bytes()
    tensors = load(whole)

    def refused(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            mme.load(path)
        assert str(path) in str(caught.value) or "tensor" in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "damaged" in refused(whole[: len(whole) // 2])
    assert "damaged" in refused(b"")
    assert "damaged" in refused(b"{}" * 500)
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    assert "format None" in refused(other.read_bytes())
    from safetensors import safe_open

    path.write_bytes(whole)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors["tables/item_0"][3, 1] += 1
    save_file(tensors, other, metadata)
    assert "damaged export (its SHA-256 is not the one that it says)" in refused(other.read_bytes())
    tensors["tables/item_0"][3, 1] = np.nan
    save_file(tensors, other, with_sum(tensors, metadata))
    assert "tables/item_0 is not finite" in refused(other.read_bytes())
    del tensors["tables/item_0"]
    save_file(tensors, other, with_sum(tensors, metadata))
    assert "tables/item_0: expected shape" in refused(other.read_bytes())
    tensors["item_ids"] = tensors["item_ids"][:40]
    save_file(tensors, other, with_sum(tensors, metadata))
    assert "damaged export" in refused(other.read_bytes())


def test_an_output_that_cannot_be_written_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert export(trained, "items", tmp_path / "file" / "items.parquet") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert export(trained, "items", tmp_path) == 2
    assert "is a folder, expected a file name" in capsys.readouterr().err
