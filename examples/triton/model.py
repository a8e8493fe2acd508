"""The encoder of a trained model for the Python backend of NVIDIA Triton Inference Server.

It runs beside `model.pt2` and its manifest, written by `mme export --what model` or `compiled`, and needs PyTorch of the version
in the manifest, but not mme. The histories of all requests of a batch are padded to one length and encoded together.

Legend: B histories of a request, L longest of them, D total embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

Inputs = dict[str, NDArray[np.int64]]
SHORTEST = 2  # the program takes no shorter rows
BY_EVENT = {
    "items": 0,
    "timestamps": 1,
    "events": 0,
}  # inputs with a place per event, and how many places more they have


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        path = Path(args["model_repository"]) / args["model_version"] / "model.pt2"
        self.manifest: dict[str, Any] = json.loads(path.with_name(f"{path.name}.manifest.json").read_text())
        is_compiled = self.manifest["what"] == "compiled"
        self.program: Any = (
            torch._inductor.aoti_load_package(str(path)) if is_compiled else torch.export.load(str(path)).module()
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request: its states, (B, D) float32, or the error in its inputs."""
        given = [self._inputs(request) for request in requests]
        errors = [self._error_in(inputs) for inputs in given]
        valid = [inputs for inputs, error in zip(given, errors, strict=True) if not error]
        states = iter(self._encode(valid))
        return [
            pb_utils.InferenceResponse(error=pb_utils.TritonError(error))
            if error
            else pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("states", next(states))])
            for error in errors
        ]

    def _inputs(self, request: Any) -> Inputs:
        inputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.manifest["inputs"]}
        return inputs | {"lengths": inputs["lengths"].reshape(-1)}  # (B, 1) in config.pbtxt

    def _error_in(self, inputs: Inputs) -> str:
        items, lengths, longest = inputs["items"], inputs["lengths"], self.manifest["longest_history"]
        width = items.shape[1]
        if width > longest:
            return f"items: rows of {width} events, expected at most {longest}, the newest ones"
        for name, more in BY_EVENT.items():
            if name in inputs and inputs[name].shape[1] != width + more:
                return f"{name}: rows of {inputs[name].shape[1]}, expected {width + more}"
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= width:
            return f"lengths: {lengths.min()} to {lengths.max()}, expected 1 to {width}"
        if items.size and not 0 <= items.min() <= items.max() < self.manifest["items"]:
            return f"items: {items.min()} to {items.max()}, expected indices from 0 to {self.manifest['items'] - 1}"
        return ""

    def _encode(self, given: list[Inputs]) -> list[NDArray[np.float32]]:
        """The states of each request, all encoded in one batch."""
        if not given:
            return []
        longest = max(SHORTEST, *(inputs["items"].shape[1] for inputs in given))
        batch = {
            name: torch.from_numpy(np.concatenate([_padded(name, inputs[name], longest) for inputs in given]))
            for name in given[0]
        }
        with torch.no_grad():
            states = self.program(**{name: value.to(self.manifest["device"]) for name, value in batch.items()})
        ends = np.cumsum([inputs["lengths"].size for inputs in given])[:-1]
        return np.split(states.cpu().numpy(), ends)


def _padded(name: str, values: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Zeros after the events of each row, which the program ignores."""
    if name not in BY_EVENT:
        return values
    missing = longest + BY_EVENT[name] - values.shape[1]
    return np.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2))
