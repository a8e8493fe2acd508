"""Metrics of a model beside popularity's, on the validation or test split of a protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mme.config import Config, load_run_config
from mme.data.dataset import PreparedDataset
from mme.data.features import Features
from mme.data.loaders import EvaluationLoader
from mme.data.split import HeldOut, Split
from mme.distributed.checkpoint import load_weights
from mme.distributed.recommender import Recommender
from mme.distributed.world import World, process_group
from mme.evaluation.collected import CollectedUsers, segments
from mme.evaluation.insight import insight
from mme.evaluation.metrics import rank_metrics, standard_errors
from mme.evaluation.ranking import Ranker
from mme.model.baselines import popularity_ranks


def evaluate(
    recommender: Recommender,
    dataset: PreparedDataset,
    config: Config,
    part: HeldOut,
    step: int,
    before_batch: Callable[[], Any] = lambda: None,
    keep_ranks_in: Path | None = None,
) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` for the model and for popularity on one held-out part, the same on every rank.

    On the test part the model's record says under ``insight`` what it has learned, see `mme.evaluation.insight`.

    Args:
        before_batch: called before each batch, on every rank; what it raises ends the evaluation.
        keep_ranks_in: the folder to write `mme.evaluation.user_ranks` into. The records then have NDCG@10 by ``segments``,
            see `mme.evaluation.segments`, and the model's a few ``examples``.
    """
    collected = None if keep_ranks_in is None else _collected(dataset, config, recommender.world)
    model, popularity = _records(recommender, dataset, config, part, step, before_batch, collected)
    if collected is not None and keep_ranks_in is not None:
        _keep(collected, dataset, [model, popularity], keep_ranks_in, recommender.world)
    if part == "test":
        counts = dataset.training_counts(Split.of(config.data)).to(recommender.world.device)
        histories = _loader(recommender, dataset, config, part).batches()
        model["insight"] = insight(recommender, counts, histories, before_batch)
    return [model, popularity]


def _records(
    recommender: Recommender,
    dataset: PreparedDataset,
    config: Config,
    part: HeldOut,
    step: int,
    before_batch: Callable[[], Any] = lambda: None,
    collected: CollectedUsers | None = None,
) -> list[dict[str, Any]]:
    by_model = target_ranks(recommender, dataset, config, part, before_batch, collected)
    common = {
        "step": step,
        "split": part,
        "protocol": config.data.protocol,
        "sort_rule": dataset.info["sort_rule"],
        "targets_sha256": dataset.targets_sha256(Split.of(config.data), part),
        "users": by_model["popularity"].numel(),
    }
    return [
        common | {"model": name} | rank_metrics(ranks) | {"standard_errors": standard_errors(ranks)}
        for name, ranks in by_model.items()
    ]


def _collected(dataset: PreparedDataset, config: Config, world: World) -> CollectedUsers:
    return CollectedUsers(dataset.training_counts(Split.of(config.data)).to(world.device))


def _keep(
    collected: CollectedUsers, dataset: PreparedDataset, records: list[dict[str, Any]], folder: Path, world: World
) -> None:
    """Writes the users' ranks and adds segments and examples to the records."""
    model, popularity = records
    about = {key: model[key] for key in ("model", "step", "split", "protocol", "targets_sha256")}
    users = collected.user_ranks(about | {"seen": model.get("seen"), "num_items": dataset.num_items})
    if world.rank == 0:
        users.write(folder)
    for record, by_kind in zip((model, popularity), segments(users).values(), strict=True):
        record["segments"] = by_kind
    model["examples"] = world.of_first(collected.examples(dataset) if world.rank == 0 else [])


def target_ranks(
    recommender: Recommender,
    dataset: PreparedDataset,
    config: Config,
    part: HeldOut,
    before_batch: Callable[[], Any] = lambda: None,
    collected: CollectedUsers | None = None,
) -> dict[str, torch.Tensor]:
    """The rank of each user's target, (users,) int64, by the model and then by popularity; the same on every rank.

    The order of the users depends on the data, the part and the number of processes alone. ``before_batch``: see
    `evaluate`. ``collected`` is told of each batch.
    """
    world = recommender.world
    loader = _loader(recommender, dataset, config, part)
    ranker = Ranker(recommender)
    counts = dataset.training_counts(Split.of(config.data)).to(world.device)
    model_ranks, popular_ranks = [counts[:0]], [counts[:0]]
    for batch in loader.batches():
        before_batch()
        model_ranks.append(ranker.target_ranks(batch.sequences, batch.seen_ids, batch.seen_offsets, batch.targets))
        local = popularity_ranks(counts, batch.targets, batch.seen_ids, batch.seen_offsets)
        popular_ranks.append(torch.cat(world.gather(local)))
        if collected is not None:
            collected.add(batch, ranker, model_ranks[-1], popular_ranks[-1])
    return {config.model.name: torch.cat(model_ranks), "popularity": torch.cat(popular_ranks)}


def _loader(recommender: Recommender, dataset: PreparedDataset, config: Config, part: HeldOut) -> EvaluationLoader:
    return EvaluationLoader(dataset, config.data, part, recommender.world, Features.of(config.model))


def load_trained(
    run: Path, checkpoint: int | None, config: Config, world: World
) -> tuple[PreparedDataset, Recommender, int]:
    """The data set of a run, and its model as of a checkpoint (None: its best), with the checkpoint's step.

    Raises:
        UserError: the data or the checkpoint is missing or damaged, or the data is not what the model was trained on.
    """
    dataset = PreparedDataset.open(config.data.path, config.data.cache_dir)
    features = config.model.feature_columns
    recommender = Recommender(config, dataset.num_items, world, dataset.feature_sizes(features))
    return dataset, recommender, load_weights(run, checkpoint, recommender, dataset.numbering_sha256(features))


def evaluate_run(run: Path, checkpoint: int | None, *, save_ranks: bool = False) -> dict[str, Any]:
    """The test metrics of a run's checkpoint (None: its best), with popularity's under `popularity`, as one JSON object.

    Args:
        save_ranks: also writes `mme.evaluation.user_ranks` into the run's folder.

    Raises:
        UserError: the run, its configuration, its data or the checkpoint is missing or damaged.
    """
    config = load_run_config(run)
    with process_group() as world:
        dataset, recommender, step = load_trained(run, checkpoint, config, world)
        collected = _collected(dataset, config, world) if save_ranks else None
        model, popularity = _records(recommender, dataset, config, "test", step, collected=collected)
        if collected is not None:
            _keep(collected, dataset, [model, popularity], run, world)
    return {"run": str(run), "checkpoint": step, **model, "popularity": popularity}
