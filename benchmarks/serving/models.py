"""Models with random weights at a given size of the catalogue, written by the real exports, and histories to ask them with.

A server's speed does not depend on whether its weights are trained. The recall of an index does: random vectors have no
structure that a graph could follow, so it is lower than that of trained ones.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch

import mme
from mme.config import Config, dump_config
from mme.data.numbering import Numbering
from mme.inference.export import export
from mme.inference.model import Knowledge, TrainedModel
from mme.model.decoder import Decoder

FIRST_ID = 1_000
TIMES = (1_500_000_000, 1_600_000_000)
MEDIAN_EVENTS, SIGMA = 60, 1.0  # log-normal, mean about 100, like the sets of benchmarks.data_loading


@dataclass(frozen=True)
class Exports:
    """The files of one model."""

    items: int
    weights: Path
    index: Path


def exports_of(config: Config, items: int, folder: Path, with_index: bool) -> Exports:
    """Exports weights, and an index, of a random model into ``folder``; those of the same configuration are made once."""
    name = f"{items}-{hashlib.sha256(dump_config(config).encode()).hexdigest()[:8]}"
    made = Exports(items, folder / f"{name}.safetensors", folder / f"{name}.faiss")
    model = None
    if not manifest(made.weights).exists():
        model = random_model(config, items)
        export(model, "weights", made.weights)
    if with_index and not manifest(made.index).exists():
        faiss.omp_set_num_threads(os.cpu_count() or 1)  # of this process; the servers have the environment's
        export(model or mme.load(made.weights, device="cpu"), "index", made.index)
    return made


def manifest(output: Path) -> Path:
    """The manifest that an export writes last."""
    return output.with_name(f"{output.name}.manifest.json")


def random_model(config: Config, items: int) -> TrainedModel:
    generator = np.random.default_rng(items)
    torch.manual_seed(items)
    weights = {
        f"decoder/{name}": torch.randn_like(value) * max(value.shape[0], 1) ** -0.5
        for name, value in Decoder(config).named_parameters()
    }
    for view in range(config.model.num_tables):
        weights[f"tables/item_{view}"] = torch.randn(items, config.model.view_dim)
    ids = pa.array(FIRST_ID + generator.permutation(items))
    knowledge = Knowledge(Numbering(ids, {}, None), generator.integers(1, 1_000, items), TIMES)
    return TrainedModel(config, knowledge, weights, f"random-{items}", "cpu")


def random_histories(count: int, items: int, longest: int) -> list[dict[str, Any]]:
    """Histories of log-normal length, at most ``longest``, over uniform items and log-uniform gaps."""
    generator = np.random.default_rng(count)
    lengths = np.exp(generator.normal(np.log(MEDIAN_EVENTS), SIGMA, count)).astype(np.int64).clip(1, longest)
    histories = []
    for length in lengths:
        gaps = np.exp(generator.uniform(0, 12, length)).astype(np.int64)
        times = TIMES[0] + np.cumsum(gaps)
        chosen = FIRST_ID + generator.integers(0, items, length)
        histories.append(
            {
                "item_ids": chosen.tolist(),
                "timestamps": times.tolist(),
                "request_timestamp": int(times[-1]) + 3_600,
            }
        )
    return histories
