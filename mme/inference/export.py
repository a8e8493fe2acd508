"""Exports a trained model for other programs: weights in one file, vectors by raw id, or a search index.

    weights  MODEL.safetensors   weights by name, raw ids and event counts; configuration and vocabularies as metadata
    items    VECTORS.parquet     item_id (raw), vector (D float32)
    users    VECTORS.parquet     user_id (raw), vector: the state after all events of the user, at the time of the last
    index    INDEX.faiss         the item vectors for inner-product search; row r of INDEX.faiss.items.parquet has id r
    model    MODEL.pt2           the encoder by torch.export, with any batch and length; item r is row r of MODEL.pt2.items.parquet
    compiled MODEL.pt2           the same, compiled by AOTInductor for the device at hand

Each export is read back and compared with the model before it gets its final name. OUTPUT.manifest.json contains the model's
name, the content and the largest difference found.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from mme import __version__
from mme.config import USER_ID, dump_config
from mme.data.description import read_info
from mme.data.features import parts_column
from mme.data.numbering import Extent
from mme.data.parts import PartSlice, limits, read_part, read_user_ids
from mme.data.remote_set import local_folder
from mme.errors import JobError, UserError
from mme.evaluation.requests import Requests
from mme.files import replacing, write_text
from mme.growth.known import substitutes
from mme.inference import exported
from mme.inference.exported import ids_to_tensor, read_export
from mme.inference.item_index import import_faiss, items_file
from mme.inference.model import TrainedModel

What = Literal["weights", "items", "users", "index", "model", "compiled"]
EXACT_UP_TO = 50_000  # items; by default a larger catalogue gets an HNSW index
RECALL_QUERIES, QUERIES_AT_ONCE = 1_000, 16  # scores of 16 queries and a million items take 64 MB
RECALL_AT = 10
USERS_AT_ONCE = 1_024
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 200, 128


def export(model: TrainedModel, what: What, output: Path, exact: bool | None = None) -> dict[str, Any]:
    """Writes an export and its manifest; returns the manifest.

    Args:
        exact: whether an index searches exhaustively; None: up to `EXACT_UP_TO` items.

    Raises:
        UserError: ``output`` cannot be written, or faiss or the data set is missing.
        JobError: the export, read back, differs from the model.
    """
    writers: dict[What, Callable[[], dict[str, Any]]] = {
        "weights": lambda: _weights(model, output),
        "items": lambda: _items(model, output),
        "users": lambda: _users(model, output),
        "index": lambda: _index(model, output, exact),
        "model": lambda: _program(model, output, is_compiled=False),
        "compiled": lambda: _program(model, output, is_compiled=True),
    }
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder, expected a file name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        manifest = {"what": what, "model": model.name, "mme": __version__, "items": model.num_items, **writers[what]()}
        write_text(output.with_name(f"{output.name}.manifest.json"), json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from error
    return manifest


def _weights(model: TrainedModel, output: Path) -> dict[str, Any]:
    numbering, knowledge = model.knowledge.numbering, model.knowledge
    tensors = {name: value.cpu().contiguous() for name, value in model.weights().items()}
    tensors |= {
        exported.ITEM_IDS: ids_to_tensor(numbering.item_ids),
        exported.COUNTS: torch.from_numpy(knowledge.counts),
    }
    if numbering.user_ids is not None:
        tensors[exported.USER_IDS] = ids_to_tensor(numbering.user_ids)
    metadata = {
        "format": exported.FORMAT,
        exported.NAME: model.name,
        exported.CONFIG: dump_config(model.config),
        exported.FEATURES: json.dumps(
            {name: list(vocabulary.numbers) for name, vocabulary in numbering.vocabularies.items()}
        ),
        exported.FEATURE_KINDS: json.dumps(
            {name: vocabulary.kind for name, vocabulary in numbering.vocabularies.items()}
        ),
        exported.TIMES: json.dumps(knowledge.times),
    }
    with replacing(output) as partial:
        save_file(tensors, partial, exported.with_sum(tensors, metadata))
        found = read_export(partial, model.device).weights()
        differences = [_largest(value.numpy() - tensors[name].numpy()) for name, value in found.items()]
        difference = _require_same(max(differences), output)
    return {"tensors": sorted(model.weights()), "largest_difference": difference}


def _items(model: TrainedModel, output: Path) -> dict[str, Any]:
    vectors = model.item_embeddings()
    return _write_vectors(output, "item_id", model.item_ids, vectors)


def _users(model: TrainedModel, output: Path) -> dict[str, Any]:
    """Writes the vectors of all users of the data set, after all their events of items that the model knows.

    Users without such events are left out. Values that the model does not know count as in requests.
    """
    folder = local_folder(model.config.data.path)
    info = read_info(folder)
    stand_ins = _stand_ins(model, folder, info)
    ids = pa.concat_arrays([ids for part in info["parts"] for ids in read_user_ids(folder, part)])
    vectors = [np.empty((0, model.config.model.embedding_dim), np.float32)]
    kept: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    row = 0
    for part in info["parts"]:
        for users in read_part(folder, part, limits(info)):
            for first in range(0, users.lengths.size, USERS_AT_ONCE):
                histories = _histories(users, first, row, model, stand_ins).of_known_items()
                known = np.flatnonzero(histories.lengths)
                if known.size:
                    vectors.append(model.encode(histories, known).cpu().numpy())
                    kept.append(row + known)
                row += histories.lengths.size
    return _write_vectors(output, "user_id", ids.take(pa.array(np.concatenate(kept))), np.concatenate(vectors))


def _stand_ins(trained: TrainedModel, folder: Path, info: dict[str, Any]) -> dict[str, NDArray[np.int64]]:
    """For each feature column but `user_id`, the model's number for each number in the set, which may have grown since."""
    model, known = trained.config.model, trained.knowledge.numbering.feature_sizes()
    found = {name: np.arange(known[name]) for name in model.feature_columns if name != USER_ID}
    for name, later in substitutes(Extent(trained.num_items, known), folder, info, model).items():
        found[name] = np.append(found[name], later.numpy())
    return found


def _histories(
    users: PartSlice, first: int, row: int, trained: TrainedModel, stand_ins: Mapping[str, NDArray[np.int64]]
) -> Requests:
    """Requests for `USERS_AT_ONCE` users from ``first`` on, at the time of their last event; ``row``: of the first in the set."""
    model = trained.config.model
    lengths = users.lengths[first : first + USERS_AT_ONCE]
    begin = int(users.lengths[:first].sum())
    events = slice(begin, begin + int(lengths.sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = users.timestamps[events]
    of_events = {name: numbers[users.features[parts_column(name)][events]] for name, numbers in stand_ins.items()}
    of_users = {}
    if USER_ID in model.user_features:
        numbers = np.arange(row, row + lengths.size) + 1
        of_users[USER_ID] = np.where(numbers < trained.knowledge.numbering.feature_sizes()[USER_ID], numbers, 0)
    items = np.where(users.items[events] < trained.num_items, users.items[events], -1)  # -1: added to the set since
    return Requests(pa.nulls(lengths.size), offsets, items, times, times[offsets[1:] - 1], of_events, of_users)


def _write_vectors(output: Path, name: str, ids: pa.Array, vectors: NDArray[np.float32]) -> dict[str, Any]:
    width = vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
    with replacing(output) as partial:
        pq.write_table(pa.table({name: ids, "vector": column}), partial, compression="zstd")
        table = pq.read_table(partial)
        found = np.asarray(table["vector"].combine_chunks().flatten()).reshape(-1, width)
        if not table[name].combine_chunks().equals(ids):
            raise JobError(f"{output}: the ids differ from the written ones after reading back")
        difference = _require_same(_largest(found - vectors), output)
    return {"rows": len(ids), "width": width, "largest_difference": difference}


def _index(model: TrainedModel, output: Path, exact: bool | None) -> dict[str, Any]:
    faiss = import_faiss()
    vectors = model.item_embeddings()
    exact = len(vectors) <= EXACT_UP_TO if exact is None else exact
    if exact:
        index: Any = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    index.add(vectors)
    with replacing(output) as partial:
        faiss.write_index(index, str(partial))
        found = faiss.read_index(str(partial))
        kept = found.reconstruct_n(0, found.ntotal)
        difference = _require_same(_largest(kept - vectors), output)
        recall = _recall(found, vectors)
    with replacing(items_file(output)) as partial:
        pq.write_table(pa.table({"row": pa.array(np.arange(len(vectors))), "item_id": model.item_ids}), partial)
    k = min(RECALL_AT, len(vectors))
    return {"kind": "exact" if exact else "hnsw", f"recall@{k}": recall, "largest_difference": difference}


def _program(model: TrainedModel, output: Path, is_compiled: bool) -> dict[str, Any]:
    if output.suffix != ".pt2":
        raise UserError(f"--output {output}: expected a name that ends in .pt2")
    from mme.inference.program import write_program  # the compiler is slow to import

    with tempfile.TemporaryDirectory() as folder, replacing(output) as partial:
        written = Path(folder) / output.name  # the compiler chooses its format by the name
        about = write_program(model, written, is_compiled)
        shutil.copyfile(written, partial)
    _write_vectors(items_file(output), "item_id", model.item_ids, model.item_embeddings())
    return about


def _recall(index: Any, vectors: NDArray[np.float32]) -> float:
    """The share of the true nearest items that the index finds, for queries that are item vectors with added noise."""
    generator = np.random.default_rng(0)
    chosen = generator.choice(len(vectors), min(RECALL_QUERIES, len(vectors)), replace=False)
    queries = vectors[chosen] + 0.1 * generator.standard_normal((len(chosen), vectors.shape[1])).astype(np.float32)
    k = min(RECALL_AT, len(vectors))
    hits = 0
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE]
        _, found = index.search(part, k)
        scores = part @ vectors.T
        worst = np.partition(scores, -k, axis=1)[:, [-k]]  # any item with an equal score counts as found
        score_of_found = np.take_along_axis(scores, np.maximum(found, 0), axis=1)
        hits += int(((score_of_found >= worst - 1e-6) & (found >= 0)).sum())
    return hits / (len(queries) * k)


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max(initial=0.0))


def _require_same(difference: float, output: Path) -> float:
    if difference > 0:
        raise JobError(f"{output}: differs from the model by {difference:g} after reading back")
    return difference
