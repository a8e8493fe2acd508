"""Metrics of a model beside popularity's, on the validation or test split of a protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mme.config import Config, load_config
from mme.data.sequences import EvaluationLoader, PreparedDataset
from mme.distributed.checkpoint import load_weights
from mme.distributed.groups import process_group
from mme.distributed.recommender import Recommender
from mme.metrics import rank_metrics
from mme.model.baselines import popularity_ranks
from mme.ranking import Ranker

MODELS = {"fuxi": "fuxi-mme", "hstu": "hstu", "sasrec": "sasrec"}  # in metrics and report, by `model.block`


def evaluate(
    recommender: Recommender,
    dataset: PreparedDataset,
    config: Config,
    split: str,
    step: int,
    before_batch: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` for the model and for popularity on one split, the same on every rank.

    ``before_batch`` is called before each batch, on every rank; what it raises ends the evaluation.
    """
    world, data = recommender.world, config.data
    fraction = data.global_time_test_fraction
    loader = EvaluationLoader(
        dataset,
        data.protocol,
        split,
        max_seq_len=data.max_seq_len,
        batch_size=data.eval_batch_size,
        rank=world.rank,
        world_size=world.size,
        global_time_test_fraction=fraction,
    )
    ranker = Ranker(recommender)
    counts = dataset.training_counts(data.protocol, fraction).to(world.device)
    model_ranks, popular_ranks = [], []
    for batch in loader.batches():
        before_batch()
        batch = batch.to(world.device)
        model_ranks.append(ranker.target_ranks(batch.sequences, batch.seen_ids, batch.seen_offsets, batch.targets))
        local = popularity_ranks(counts, batch.targets, batch.seen_ids, batch.seen_offsets)
        popular_ranks.append(torch.cat(world.gather(local)))
    common = {
        "step": step,
        "split": split,
        "protocol": data.protocol,
        "sort_rule": dataset.info["sort_rule"],
        "targets_sha256": dataset.targets_sha256(data.protocol, split, fraction),
        "users": sum(ranks.numel() for ranks in model_ranks),
    }
    by_model = {MODELS[config.model.block]: model_ranks, "popularity": popular_ranks}
    return [common | {"model": name} | rank_metrics(torch.cat(ranks)) for name, ranks in by_model.items()]


def evaluate_run(run: Path, checkpoint: int | None) -> dict[str, Any]:
    """The test metrics of a run's checkpoint (None: its best), with popularity's under `popularity`, as one JSON object.

    Raises:
        UserError: the run, its configuration, its data or the checkpoint is missing or damaged.
    """
    config = load_config(run / "config.yaml")
    with process_group() as world:
        dataset = PreparedDataset.open(Path(config.data.path))
        recommender = Recommender(config, dataset.num_items, world)
        step = load_weights(run, checkpoint, recommender)
        model, popularity = evaluate(recommender, dataset, config, "test", step)
    return {"run": str(run), "checkpoint": step, **model, "popularity": popularity}
