"""A whole model of the public FuXi-α code gives its states, and recommends.

`golden/fuxi_model.npz` holds the state dict of a small model of the public implementation (`state.*`), padded histories (`ids`,
`timestamps` with the request's time after the last event, `lengths`) and the states that `FuXi.encode` returned for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mme
from mme.errors import UserError
from mme.inference.export import export
from mme.interop.public_model import model_from_public

GOLDEN = np.load(Path(__file__).parent / "golden" / "fuxi_model.npz")
PREFIX = "state."
STATE = {name.removeprefix(PREFIX): torch.from_numpy(GOLDEN[name]) for name in GOLDEN if name.startswith(PREFIX)}
HISTORIES = [
    {"item_ids": ids[:n].tolist(), "timestamps": times[:n].tolist(), "request_timestamp": int(times[n])}
    for ids, times, n in zip(GOLDEN["ids"], GOLDEN["timestamps"], GOLDEN["lengths"], strict=True)
]


def saved(folder: Path, state: dict[str, Any]) -> Path:
    """A checkpoint as the public trainer writes it."""
    path = folder / "fuxi_ep100"
    torch.save({"epoch": 100, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}, path)
    return path


def test_states_equal_those_of_the_public_code(tmp_path: Path) -> None:
    model = model_from_public(saved(tmp_path, STATE), num_heads=2, device="cpu")
    np.testing.assert_allclose(model.user_embeddings(HISTORIES), GOLDEN["states"], rtol=0, atol=1e-5)
    items = GOLDEN["state.module._embedding_module._item_emb.weight"][1:]
    vectors = items / np.linalg.norm(items, axis=1, keepdims=True)
    np.testing.assert_allclose(model.item_embeddings(range(1, 13)), vectors, rtol=0, atol=1e-6)
    scores = GOLDEN["states"] @ vectors.T
    for row, history in enumerate(HISTORIES):
        scores[row, np.array(history["item_ids"]) - 1] = -np.inf
    expected = (1 + np.argsort(-scores, axis=1))[:, :3].tolist()
    assert model.recommend(HISTORIES, k=3)["item_ids"].to_pylist() == expected

    export(model, "weights", tmp_path / "public.safetensors")
    exported = mme.load(tmp_path / "public.safetensors", device="cpu")
    assert exported.recommend(HISTORIES, k=3)["item_ids"].to_pylist() == expected


def test_other_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(state: dict[str, Any], num_heads: int = 2) -> str:
        with pytest.raises(UserError) as caught:
            model_from_public(saved(tmp_path, state), num_heads=num_heads)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    block = "_fuxi._attention_layers.0"
    without = {name: value for name, value in STATE.items() if name != f"module.{block}._mffn.lin3.weight"}
    assert f"no tensor {block}._mffn.lin3.weight" in refused(without)
    assert "unknown tensor _hstu.x" in refused({**STATE, "module._hstu.x": torch.ones(1)})
    assert "no tensor" in refused({})
    assert "num_heads (4) does not divide" in refused(STATE, num_heads=4)
    positions = {**STATE, "module._input_features_preproc._pos_emb.weight": torch.ones(9, 8)}
    assert "blocks.0.pos_weights: expected shape [17], found [15]" in refused(positions)
    assert "has no model_state_dict of tensors" in refused({"x": "y"})
    path = tmp_path / "other"
    for content in (b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a checkpoint of torch\.save with tensors only"):
            model_from_public(path)
    torch.save({"model_state_dict": Path("x")}, path)
    with pytest.raises(UserError, match="with tensors only"):
        model_from_public(path)
    with pytest.raises(UserError, match="No such file"):
        model_from_public(tmp_path / "none")
