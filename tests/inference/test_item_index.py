"""A model that searches its index gives the lists of exact search; another model's index is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import pyarrow.parquet as pq
import pytest

import mme
from benchmarks.serving.models import FIRST_ID, random_histories, random_model
from mme.config import load_config
from mme.errors import UserError
from mme.inference.export import export
from mme.inference.model import TrainedModel

ITEMS = 300
SMALL = ["data.path=unused", "data.max_seq_len=16", "model.embedding_dim=8", "model.num_tables=2", "model.num_blocks=1"]
HISTORIES = random_histories(8, ITEMS, 16)  # excluding their items leaves more than nine tenths of the catalogue


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return random_model(load_config(None, SMALL), ITEMS)


@pytest.fixture
def weights(model: TrainedModel, tmp_path: Path) -> Path:
    export(model, "weights", tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def lists(model: TrainedModel, **settings: Any) -> list[list[int]]:
    return model.recommend(HISTORIES, **settings)["item_ids"].to_pylist()


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 5},
        {"k": 5, "exclude_seen": False},
        {"k": 5, "blocked": range(FIRST_ID, FIRST_ID + 12)},
        {"k": ITEMS},
        {"k": 5, "blocked": range(FIRST_ID, FIRST_ID + 200)},  # more than can be excluded
        {"k": 5, "candidates": range(FIRST_ID, FIRST_ID + 50)},
    ],
    ids=["seen excluded", "seen included", "blocked", "all items", "many blocked", "candidates"],
)
def test_lists_of_an_exact_index_are_those_of_the_model(
    model: TrainedModel, weights: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    export(model, "index", tmp_path / "items.faiss", exact=True)
    indexed = mme.load(weights, device="cpu", index=tmp_path / "items.faiss")
    found, expected = (each.recommend(HISTORIES, **settings) for each in (indexed, model))
    assert found["item_ids"].to_pylist() == expected["item_ids"].to_pylist()
    for ours, exact in zip(found["scores"].to_pylist(), expected["scores"].to_pylist(), strict=True):
        assert ours == pytest.approx(exact, abs=1e-6)


def test_an_approximate_index_is_searched_and_excludes_items(
    model: TrainedModel, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = export(model, "index", tmp_path / "items.faiss", exact=False)
    assert manifest["kind"] == "hnsw" and manifest["recall@10"] > 0.95
    indexed = mme.load(weights, device="cpu", index=tmp_path / "items.faiss")
    monkeypatch.setattr(indexed._ranker, "top_k", None)  # exact search
    shared = [len(set(found) & set(exact)) for found, exact in zip(lists(indexed), lists(model), strict=True)]
    assert sum(shared) >= 76  # of 80
    for history, found in zip(HISTORIES, lists(indexed), strict=True):
        assert len(found) == 10 and not set(found) & set(history["item_ids"])


def test_another_index_is_refused_in_one_line(model: TrainedModel, weights: Path, tmp_path: Path) -> None:
    path, items = tmp_path / "items.faiss", tmp_path / "items.faiss.items.parquet"
    export(model, "index", path, exact=True)
    whole = path.read_bytes()

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            mme.load(weights, device="cpu", index=path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        assert refused().startswith(f"{path}: not a faiss index with its items, or damaged (")
    vectors = model.item_embeddings()
    vectors[7, 3] += 1e-3
    other = faiss.IndexFlatIP(vectors.shape[1])
    other.add(vectors)
    faiss.write_index(other, str(path))
    assert refused() == f"{path}: the index of another model: expected an export of this one"
    path.write_bytes(whole)
    pq.write_table(pq.read_table(items).slice(1), items)
    assert "the index of another model" in refused()
    items.unlink()
    assert refused() == f"{items}: no such file"
