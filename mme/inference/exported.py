"""Reads exported weights: one safetensors file that needs neither the run nor its data set.

tensors     the model's weights by name; raw ids as the bytes of an Arrow stream; event counts of the items
metadata    format, name, config (YAML), features ({column: values}), feature_kinds ({column: kind}),
            times ([first, last] in seconds), sha256 of all this
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mme.config import parse_saved_config
from mme.data.features import KINDS, Vocabulary
from mme.data.numbering import Numbering
from mme.errors import UserError, first_line
from mme.files import open_to_read
from mme.inference.model import Knowledge, TrainedModel
from mme.inference.weights import WEIGHTS

FORMAT = "mme-weights-2"
NAME, CONFIG, FEATURES, FEATURE_KINDS, TIMES = "name", "config", "features", "feature_kinds", "times"
ITEM_IDS, USER_IDS, COUNTS = "item_ids", "user_ids", "item_counts"
SUM = "sha256"


def read_export(path: Path, device: str | torch.device | None = None) -> TrainedModel:
    """Loads a model from exported weights.

    Raises:
        UserError: the file is missing, damaged or not an export of weights.
    """
    try:
        with open_to_read(path):  # rejects anything but a regular file
            pass
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r} of `mme export --what weights`"
                )
            # Copies: the library's tensors are views of the mapped file, and end the process if it is cut off later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if with_sum(tensors, metadata)[SUM] != metadata.get(SUM):
            raise UserError(f"{path}: damaged export (its SHA-256 is not the one that it says)")
        config = parse_saved_config(metadata[CONFIG], f"{path}: configuration")
        kinds = json.loads(metadata.get(FEATURE_KINDS, "{}"))
        vocabularies = {
            name: KINDS[kinds.get(name, Vocabulary.kind)](values)
            for name, values in json.loads(metadata[FEATURES]).items()
        }
        users = _ids_from_tensor(tensors[USER_IDS]) if USER_IDS in tensors else None
        numbering = Numbering(_ids_from_tensor(tensors[ITEM_IDS]), vocabularies, users)
        first, last = json.loads(metadata[TIMES])
        knowledge = Knowledge(numbering, tensors[COUNTS].numpy(), (int(first), int(last)))
        name = metadata[NAME]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({first_line(error)})") from error
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged export ({first_line(error)})") from error
    weights = {name: value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    flawed = next((name for name, value in weights.items() if not value.isfinite().all()), None)
    if flawed:
        raise UserError(f"{path}: tensor {flawed} is not finite")
    return TrainedModel(config, knowledge, weights, name, device)


def with_sum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """``metadata`` with the SHA-256 of itself and of the contiguous ``tensors``: their names, dtypes, shapes and bytes."""
    content = {name: value for name, value in metadata.items() if name != SUM}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(tensors[name].numpy().data)
    return content | {SUM: digest.hexdigest()}


def ids_to_tensor(ids: pa.Array) -> Tensor:
    """Encodes raw ids of any type as an Arrow stream, (n,) uint8."""
    table = pa.table({"ids": ids})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)


def _ids_from_tensor(data: Tensor) -> pa.Array:
    table = pa.ipc.open_stream(pa.py_buffer(data.numpy().tobytes())).read_all()
    table.validate(full=True)
    return table["ids"].combine_chunks()
