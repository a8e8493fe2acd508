"""The encoder as a program for other runtimes: `torch.export`, or compiled by AOTInductor.

Its inputs and result are those of `mme.inference.padded.PaddedEncoder`; batch and length are free. The program takes item
indices: row r of OUTPUT.items.parquet has the raw id and the vector of item r, whose dot product with a state is its score.

Legend: B histories, L longest of them, D total embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mme.config import USER_ID, Config
from mme.errors import JobError
from mme.evaluation.requests import Requests
from mme.inference.model import TrainedModel

MOST_HISTORIES = 65_536
CHECKED_HISTORIES = 16
# Between sums in another order in float32, or against a decoder in bfloat16.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.05}


def export_encoder(model: TrainedModel) -> ExportedProgram:
    """`torch.export` of the padded encoder with B and L dynamic, L at least 2: a width of one would mean broadcasting."""
    inputs = padded_inputs(sample_requests(model, np.array([2, 3])), model.config)
    batch, events = Dim("batch", max=MOST_HISTORIES), Dim("events", min=2, max=model.config.history_len)
    shapes: dict[str, dict[int, Any]] = {
        "items": {0: batch, 1: events},
        "lengths": {0: batch},
        "timestamps": {0: batch, 1: events + 1},
        "events": {0: batch, 1: events},
        "users": {0: batch},
    }
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.no_grad():
        return torch.export.export(
            model.padded_encoder(), (), on_device, dynamic_shapes={name: shapes[name] for name in inputs}
        )


def write_program(model: TrainedModel, partial: Path, is_compiled: bool) -> dict[str, Any]:
    """Writes the program, loads it again and compares its states with the model's; returns what the manifest says of it.

    Raises:
        JobError: its states differ from the model's.
    """
    program = export_encoder(model)
    if is_compiled:
        torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        loaded: Any = torch._inductor.aoti_load_package(str(partial))
    else:
        torch.export.save(program, str(partial))
        loaded = torch.export.load(str(partial)).module()
    precision = model.config.train.precision_on(model.device.type)
    difference = largest_difference(model, loaded)
    if not difference <= TOLERANCES.get(precision, TOLERANCES["bfloat16"]):
        raise JobError(f"the states of the exported program differ from the model's by up to {difference:g}")
    arguments = padded_inputs(sample_requests(model, np.array([1])), model.config)
    free = {"items": 2, "lengths": 1, "timestamps": 2, "events": 2, "users": 1}  # leading dimensions of any size
    shapes = {name: [-1] * free[name] + list(value.shape[free[name] :]) for name, value in arguments.items()}
    return {
        "inputs": list(arguments),
        "shapes": {**shapes, "states": [-1, model.config.model.embedding_dim]},
        "device": model.device.type,
        "longest_history": model.config.history_len,
        "torch": torch.__version__,
        "largest_difference": difference,
    }


def largest_difference(model: TrainedModel, program: Any) -> float:
    """Between the states of histories of many lengths, in one batch and alone."""
    lengths = np.linspace(1, model.config.history_len, CHECKED_HISTORIES).astype(np.int64)
    requests = sample_requests(model, lengths)
    expected = model.encode(requests)
    inputs = {name: value.to(model.device) for name, value in padded_inputs(requests, model.config).items()}
    with torch.no_grad():
        together = program(**inputs)
        shortest = {"items": 2, "timestamps": 3, "events": 2}
        first = {name: value[:1, : shortest[name]] if name in shortest else value[:1] for name, value in inputs.items()}
        alone = program(**first)
    return max(float((together - expected).abs().max()), float((alone - expected[:1]).abs().max()))


def padded_inputs(requests: Requests, config: Config) -> dict[str, Tensor]:
    """The arguments of the program, by name, for histories of known items: the newest `history_len` events of each."""
    lengths = np.minimum(requests.lengths, config.history_len)
    longest = max(2, int(lengths.max(initial=0)))
    place = np.arange(longest)
    index = requests.offsets[1:, None] - lengths[:, None] + place
    is_event = place < lengths[:, None]
    index = np.where(is_event, index, 0)
    times = np.pad(np.where(is_event, requests.times[index], 0), ((0, 0), (0, 1)))
    times[np.arange(lengths.size), lengths] = requests.request_times
    arrays = {"items": np.where(is_event, requests.items[index], 0), "lengths": lengths, "timestamps": times}
    model = config.model
    if model.event_features:
        columns = [np.where(is_event, requests.of_events[name][index], 0) for name in model.event_features]
        arrays["events"] = np.stack(columns, axis=-1)
    if model.user_features:
        # A column of events serves as a user's feature by its first value in the window.
        columns = [
            requests.of_users[name] if name in requests.of_users else requests.of_events[name][index[:, 0]]
            for name in model.user_features
        ]
        arrays["users"] = np.stack(columns, axis=-1)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def sample_requests(model: TrainedModel, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> Requests:
    """Random histories of the given lengths over the model's items, times and values of features."""
    generator = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    gaps = np.exp(generator.uniform(0, 14, offsets[-1] + lengths.size)).astype(np.int64)
    times = model.knowledge.times[0] + np.cumsum(gaps[: offsets[-1]])
    sizes = model.knowledge.numbering.feature_sizes()
    settings = model.config.model
    of_events = {
        name: generator.integers(0, sizes[name], offsets[-1]) for name in settings.feature_columns if name != USER_ID
    }
    of_users = (
        {USER_ID: generator.integers(0, sizes[USER_ID], lengths.size)} if USER_ID in settings.user_features else {}
    )
    return Requests(
        pa.nulls(lengths.size),
        offsets,
        generator.integers(0, model.num_items, offsets[-1]),
        times,
        times[offsets[1:] - 1] + gaps[offsets[-1] :],
        of_events,
        of_users,
    )
