"""The example of a Triton model repository: its Python model gives the model's states, its config.pbtxt the export's shapes.

Triton is not installed here. `triton_python_backend_utils`, which exists only in its server, is replaced by the four names that
the Python model uses.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.models import random_model
from mme.config import load_config
from mme.inference.export import export as write_export
from mme.inference.program import padded_inputs, sample_requests
from tests.trained import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "triton"
SMALL = [
    "data.path=unused",
    "data.max_seq_len=32",
    "model.embedding_dim=16",
    "model.num_tables=2",
    "model.num_blocks=1",
]

pytestmark = pytest.mark.slow


@dataclass
class Tensor:
    name: str
    values: Any

    def as_numpy(self) -> Any:
        return self.values


@dataclass
class Response:
    output_tensors: Any = ()
    error: Any = None


def python_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of a model repository's Python model."""
    backend: Any = types.ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.InferenceResponse, backend.TritonError = Tensor, Response, str
    backend.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    spec = importlib.util.spec_from_file_location("triton_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def tensors(config: str, section: str) -> dict[str, tuple[str, list[int]]]:
    """Name → type and dimensions of the tensors in a section of config.pbtxt."""
    (found,) = re.findall(rf"^{section} \[\n(.*?)\n\]", config, re.DOTALL | re.MULTILINE)
    entries = re.findall(r'name: "(\w+)" data_type: (\w+) dims: \[ ([-\d, ]+) \]', found)
    return {name: (kind, [int(size) for size in dims.split(",")]) for name, kind, dims in entries}


def test_the_repository_encodes_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(load_config(None, SMALL), 60)
    export = tmp_path / "small.pt2"
    write_export(model, "model", export)
    command = [sys.executable, EXAMPLE / "make_repository.py", export, tmp_path / "models", "--name", "small"]
    subprocess.run(command, check=True)

    manifest = json.loads((tmp_path / "small.pt2.manifest.json").read_text())
    config = (tmp_path / "models/small/config.pbtxt").read_text()
    assert 'name: "small"' in config and 'backend: "python"' in config
    assert list(tensors(config, "input")) == manifest["inputs"] == ["items", "lengths", "timestamps"]
    assert tensors(config, "input") == {
        "items": ("TYPE_INT64", [-1]),
        "lengths": ("TYPE_INT64", [1]),
        "timestamps": ("TYPE_INT64", [-1]),
    }
    assert manifest["shapes"] == {"items": [-1, -1], "lengths": [-1], "timestamps": [-1, -1], "states": [-1, 16]}
    assert tensors(config, "output") == {"states": ("TYPE_FP32", [16])}

    served = python_model(tmp_path / "models/small/1/model.py", monkeypatch)
    served.initialize({"model_repository": str(tmp_path / "models/small"), "model_version": "1"})
    of_requests = [sample_requests(model, np.array(lengths)) for lengths in ([1], [5, 2], [32])]
    inputs: list[Any] = [
        {name: value.numpy() for name, value in padded_inputs(each, model.config).items()} for each in of_requests
    ]
    for each in inputs:
        each["lengths"] = each["lengths"][:, None]
    # A single history may be shorter than the program's rows.
    inputs[0] |= {"items": inputs[0]["items"][:, :1], "timestamps": inputs[0]["timestamps"][:, :2]}
    wrong = [
        ({**inputs[1], "items": inputs[1]["items"] + 60}, "expected indices from 0 to 59"),
        ({**inputs[1], "lengths": inputs[1]["lengths"] + 1}, "lengths: 3 to 6, expected 1 to 5"),
        ({**inputs[1], "timestamps": inputs[1]["timestamps"][:, 1:]}, "timestamps: rows of 5, expected 6"),
        ({**inputs[1], "items": np.zeros((1, 33), np.int64)}, "rows of 33 events, expected at most 32"),
    ]
    answers = served.execute([*inputs, *[each for each, _ in wrong]])
    for answer, requests in zip(answers, of_requests, strict=False):
        (states,) = answer.output_tensors
        assert states.name == "states" and states.values.dtype == np.float32
        np.testing.assert_allclose(states.values, model.encode(requests).numpy(), rtol=0, atol=1e-5)
    for answer, (_, message) in zip(answers[3:], wrong, strict=True):
        assert message in answer.error

    items = tmp_path / "items.parquet"
    write_export(model, "items", items)
    refused = subprocess.run([*command[:2], items, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "expected 'model' or 'compiled'" in refused.stderr
    assert not (tmp_path / "none").exists()
