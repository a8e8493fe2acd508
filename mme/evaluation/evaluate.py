"""Computes the metrics of a model and of the popularity baseline on the held-out parts of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mme.config import Config, load_run_config
from mme.data.dataset import PreparedDataset
from mme.data.features import Features
from mme.data.loaders import EvaluationLoader
from mme.data.split import HeldOut, Split
from mme.distributed.checkpoint import best_sound, load_weights
from mme.distributed.checkpoint_index import folder
from mme.distributed.recommender import Recommender
from mme.distributed.spread import share_of
from mme.distributed.world import World, process_group
from mme.errors import UserError, print_line
from mme.evaluation.collected import CollectedUsers, item_names, segments
from mme.evaluation.insight import insight
from mme.evaluation.metrics import rank_metrics, standard_errors
from mme.evaluation.neighbours import named
from mme.evaluation.popularity import Popularity, popularity_ranks
from mme.evaluation.ranking import Ranker
from mme.evaluation.record import repeats_warning
from mme.evaluation.seen import Seen, excluded_items, is_repeated
from mme.growth.known import known_extent, substitutes


def evaluate(
    recommender: Recommender,
    dataset: PreparedDataset,
    config: Config,
    part: HeldOut,
    step: int,
    before_batch: Callable[[], Any] = lambda: None,
    keep_ranks_in: Path | None = None,
    with_insight: bool = True,
) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` for the model and for popularity on one held-out part, the same on every rank.

    Each record says how items that a user has had before were treated (``seen``, see `mme.evaluation.seen`) and which share of
    the targets were such items (``repeated_targets``).

    Args:
        before_batch: called before each batch, on every rank; what it raises ends the evaluation.
        keep_ranks_in: the folder to write `mme.evaluation.user_ranks` into. The records then have NDCG@10 by ``segments``,
            see `mme.evaluation.segments`, and the model's a few ``examples``.
        with_insight: on the test part, adds what the model has learned (`mme.evaluation.insight`) to its record.

    Raises:
        NonFiniteError: the model has no valid scores, see `mme.evaluation.ranking.Ranker`.
    """
    popularity = _popularity(recommender, dataset, config)
    collected = None if keep_ranks_in is None else CollectedUsers(popularity)
    ranks = target_ranks(recommender, dataset, config, part, popularity, before_batch, collected)
    records = _records(ranks, recommender.num_items, dataset, config, part, step)
    if collected is not None and keep_ranks_in is not None:
        _keep(collected, recommender, dataset, records, keep_ranks_in)
    if with_insight and part == "test":
        histories = _loader(recommender, dataset, config, part).batches()
        found = insight(recommender, popularity, histories, before_batch)
        names = item_names(dataset) if recommender.world.rank == 0 else None
        named_neighbours = [] if names is None else named(found["neighbours"], names)
        found["neighbours"] = recommender.world.of_first(named_neighbours)
        records[0]["insight"] = found
    return records


def _records(
    ranks: TargetRanks, num_items: int, dataset: PreparedDataset, config: Config, part: HeldOut, step: int
) -> list[dict[str, Any]]:
    common = {
        "step": step,
        "split": part,
        "protocol": config.data.protocol,
        "seen": config.eval.seen,
        "repeated_targets": ranks.repeated.double().mean().item(),
        "sort_rule": dataset.info["sort_rule"],
        "targets_sha256": dataset.targets_sha256(Split.of(config.data), part, num_items),
        "users": ranks.repeated.numel(),
    }
    return [
        common | {"model": name} | rank_metrics(of_users) | {"standard_errors": standard_errors(of_users)}
        for name, of_users in ranks.by_model.items()
    ]


def _popularity(recommender: Recommender, dataset: PreparedDataset, config: Config) -> Popularity:
    """Of the items that the model knows; a collective."""
    world, num_items = recommender.world, recommender.num_items
    counts = dataset.training_counts(Split.of(config.data), share_of(num_items, world))
    return Popularity.of(counts.to(world.device), num_items, world)


def _keep(
    collected: CollectedUsers,
    recommender: Recommender,
    dataset: PreparedDataset,
    records: list[dict[str, Any]],
    run: Path,
) -> None:
    """Writes the users' ranks and adds segments and examples to the records."""
    world = recommender.world
    model, popularity = records
    about = {key: model[key] for key in ("model", "step", "split", "protocol", "targets_sha256")}
    users = collected.user_ranks(about | {"seen": model.get("seen"), "num_items": recommender.num_items})
    if world.rank == 0:
        users.write(run)
    for record, by_kind in zip((model, popularity), segments(users).values(), strict=True):
        record["segments"] = by_kind
    model["examples"] = world.of_first(collected.examples(dataset) if world.rank == 0 else [])


@dataclass(frozen=True)
class TargetRanks:
    """The rank of each user's target, the same on every rank.

    The order of the users depends only on the data, the part and the number of processes.

    Attributes:
        by_model: (users,) int64 ranks by the model, then by popularity; `UNRANKED` for a target that is in no list.
        repeated: (users,) bool, whether the user has had the target before.
    """

    by_model: dict[str, Tensor]
    repeated: Tensor


def target_ranks(
    recommender: Recommender,
    dataset: PreparedDataset,
    config: Config,
    part: HeldOut,
    popularity: Popularity | None = None,
    before_batch: Callable[[], Any] = lambda: None,
    collected: CollectedUsers | None = None,
) -> TargetRanks:
    """Ranks every target of ``part``.

    Args:
        popularity: of the items in training; None: it is counted here.
        before_batch: see `evaluate`.
        collected: receives each batch.

    Raises:
        NonFiniteError: see `Ranker`.
    """
    world = recommender.world
    loader = _loader(recommender, dataset, config, part)
    ranker = Ranker(recommender)
    popularity = popularity or _popularity(recommender, dataset, config)
    none = torch.empty(0, dtype=torch.int64, device=world.device)
    model_ranks, popular_ranks, repeated = [none], [none], [none]
    for batch in loader.batches():
        before_batch()
        excluded = excluded_items(batch, config.eval.seen)
        model_ranks.append(ranker.target_ranks(batch.sequences, *excluded, batch.targets))
        _, places = popularity.of_items(torch.cat([batch.targets, excluded[0]]))
        of_targets, of_excluded = places.tensor_split([batch.targets.numel()])
        popular = popularity_ranks(of_targets, of_excluded, excluded[1])
        is_repeat = is_repeated(batch.targets, batch.seen_ids, batch.seen_offsets).long()
        of_all_ranks = torch.cat(world.gather(torch.stack([popular, is_repeat], dim=1)))
        popular_ranks.append(of_all_ranks[:, 0])
        repeated.append(of_all_ranks[:, 1])
        if collected is not None:
            collected.add(batch, ranker, model_ranks[-1], popular_ranks[-1])
    by_model = {config.model.name: torch.cat(model_ranks), "popularity": torch.cat(popular_ranks)}
    return TargetRanks(by_model, torch.cat(repeated) > 0)


def _loader(recommender: Recommender, dataset: PreparedDataset, config: Config, part: HeldOut) -> EvaluationLoader:
    features = Features.of(config.model)
    return EvaluationLoader(dataset, config.data, part, recommender.world, features, recommender.num_items)


def load_trained(
    run: Path, checkpoint: int | None, config: Config, world: World
) -> tuple[PreparedDataset, Recommender, int]:
    """The data set of a run, its model at a checkpoint (None: the best one), and the step of the checkpoint.

    Raises:
        UserError: the data or the checkpoint is missing or damaged, the data is not what the model was trained on, or no user
            has a test target that the model knows.
    """
    dataset = PreparedDataset.open(config.data.path, config.data.cache_dir)
    index = best_sound(run, checkpoint, world)
    step, at = index.progress.step, folder(run, index.progress.step)
    known = known_extent(index.progress, at, dataset.folder, dataset.info, config.model)
    if not dataset.targets(Split.of(config.data), "test", known.num_items)[0].size:
        raise UserError(
            f"{config.data.path}: no user has a test target and an earlier event among the {known.num_items:,} items that "
            f"{at} knows"
        )
    stand_ins = substitutes(known, dataset.folder, dataset.info, config.model)
    recommender = Recommender(config, known.num_items, world, known.feature_sizes, False, stand_ins)
    load_weights(run, index, recommender)
    return dataset, recommender, step


def evaluate_run(
    run: Path,
    checkpoint: int | None,
    seen: Seen | None = None,
    *,
    save_ranks: bool = False,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """The test metrics of a run's checkpoint (None: the best one) as one JSON object, with popularity's under `popularity`.

    Args:
        seen: replaces the run's `eval.seen`; None keeps it.
        save_ranks: also writes `mme.evaluation.user_ranks` into the run's folder.
        cache_dir: keeps the flat file of the events; None: the data set's folder does, whatever the run's configuration says.

    Raises:
        UserError: the run, its configuration, its data or the checkpoint is missing or damaged.
        NonFiniteError: the model has no valid scores.
    """
    config = load_run_config(run)
    config.eval.seen = seen or config.eval.seen
    config.data.cache_dir = None if cache_dir is None else str(cache_dir)
    with process_group() as world:
        dataset, recommender, step = load_trained(run, checkpoint, config, world)
        keep_in = run if save_ranks else None
        model, popularity = evaluate(
            recommender, dataset, config, "test", step, keep_ranks_in=keep_in, with_insight=False
        )
    if world.rank == 0 and (warning := repeats_warning(model)):
        print_line(f"warning: {warning}")
    return {"run": str(run), "checkpoint": step, **model, "popularity": popularity}
