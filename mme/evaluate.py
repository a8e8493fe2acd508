"""Exact ranking of the whole catalogue with the tables still sharded.

Each rank holds the vectors of its share of the items and scores them for the histories of all ranks; only states,
target scores and counts travel. The rank of a target is 1 + the number of unseen items that score higher; equal scores
rank by item index, so that every number of processes gives the same result.

Legend: B histories of one rank's batch, U those of all ranks, D total width, S items of a rank's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mme.config import Config, load_config
from mme.data.batch import EvaluationBatch
from mme.data.sequences import EvaluationLoader, PreparedDataset
from mme.distributed.checkpoint import load_weights
from mme.distributed.groups import World, process_group
from mme.distributed.recommender import Recommender
from mme.metrics import rank_metrics
from mme.model.baselines import popularity_ranks

SCORES_AT_ONCE = 32_000_000  # elements of a score matrix


@dataclass(frozen=True)
class ScoredHistories:
    """Scores of one rank's share of the items for some histories of all ranks; seen items stand at −inf.

    Attributes:
        scores: (u, S) float32, u of the U histories.
        history: (u,) int64, which of the U they are.
        first_item: item index of column 0.
    """

    scores: Tensor
    history: Tensor
    first_item: int


def evaluate(
    recommender: Recommender, dataset: PreparedDataset, config: Config, split: str, step: int
) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` for the model and for popularity on one split, the same on every rank."""
    world = recommender.world
    loader = evaluation_loader(dataset, config, split, world)
    first_item, vectors = recommender.catalogue()
    model_ranks, popular_ranks = [], []
    counts = dataset.training_counts(config.data.protocol, config.data.global_time_test_fraction)
    for batch in loader.batches():
        batch = batch.to(world.device)
        model_ranks.append(_target_ranks(recommender, batch, first_item, vectors))
        local = popularity_ranks(counts.to(world.device), batch.targets, batch.seen_ids, batch.seen_offsets)
        popular_ranks.append(torch.cat(world.gather(local)))
    common = {
        "kind": "eval",
        "step": step,
        "split": split,
        "protocol": config.data.protocol,
        "sort_rule": dataset.info["sort_rule"],
        "targets_sha256": dataset.targets_sha256(config.data.protocol, split, config.data.global_time_test_fraction),
        "users": sum(ranks.numel() for ranks in model_ranks),
    }
    by_model = {model_name(config): model_ranks, "popularity": popular_ranks}
    return [common | {"model": name} | rank_metrics(torch.cat(ranks)) for name, ranks in by_model.items()]


def evaluate_run(run: Path, checkpoint: int | None) -> dict[str, Any]:
    """The test metrics of a run's checkpoint (None: its best) beside popularity's, as one JSON object.

    Raises:
        UserError: the run, its configuration, its data or the checkpoint is missing or damaged.
    """
    config = load_config(run / "config.yaml")
    with process_group() as world:
        dataset = PreparedDataset.open(Path(config.data.path))
        recommender = Recommender(config, dataset.num_items, world)
        step = load_weights(run, checkpoint, recommender)
        model, popularity = evaluate(recommender, dataset, config, "test", step)
    return {"run": str(run), "checkpoint": step, "model": model, "popularity": popularity}


def evaluation_loader(dataset: PreparedDataset, config: Config, split: str, world: World) -> EvaluationLoader:
    data = config.data
    return EvaluationLoader(
        dataset,
        data.protocol,
        split,
        max_seq_len=data.max_seq_len,
        batch_size=data.eval_batch_size,
        rank=world.rank,
        world_size=world.size,
        global_time_test_fraction=data.global_time_test_fraction,
    )


def model_name(config: Config) -> str:
    """What the model is called in metrics and report."""
    if config.model.num_tables == 1 and config.model.moe.num_experts == 0:
        return "fuxi-alpha"
    return "fuxi-mme"


def score_catalogue(
    states: Tensor, seen: Tensor, seen_history: Tensor, keep: Tensor, first_item: int, vectors: Tensor
) -> Iterator[ScoredHistories]:
    """Scores of a rank's share for the U histories, a part of them at a time.

    Args:
        states: (U, D) normalised states of all ranks' histories.
        seen: (n,) int64 items that must not be ranked, and ``seen_history`` (n,) whose they are.
        keep: (U,) int64, an item of each history that is ranked even if seen (−1: none).
        first_item: item index of the share's first vector.
        vectors: (S, D) normalised vectors of the share.
    """
    num_histories, num_items = states.shape[0], vectors.shape[0]
    column = seen - first_item
    excluded = (column >= 0) & (column < num_items) & (seen != keep[seen_history])
    column, row = column[excluded], seen_history[excluded]
    step = max(1, SCORES_AT_ONCE // max(1, num_items))
    for start in range(0, num_histories, step):
        end = min(start + step, num_histories)
        scores = states[start:end] @ vectors.T
        inside = (row >= start) & (row < end)
        scores[row[inside] - start, column[inside]] = -torch.inf
        yield ScoredHistories(scores, torch.arange(start, end, device=states.device), first_item)


def gather_histories(
    world: World, states: Tensor, seen_ids: Tensor, seen_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' states (U, D), their seen items (n,) and whose those are (n,), in rank order."""
    seen_counts = torch.cat(world.gather(seen_offsets.diff()))
    history = torch.repeat_interleave(torch.arange(seen_counts.numel(), device=states.device), seen_counts)
    return torch.cat(world.gather(states)), torch.cat(world.gather(seen_ids)), history


def _target_ranks(recommender: Recommender, batch: EvaluationBatch, first_item: int, vectors: Tensor) -> Tensor:
    """(U,) int64 ranks of the targets of all ranks' histories."""
    world = recommender.world
    states, seen, seen_history = gather_histories(
        world, recommender.encode(batch.sequences), batch.seen_ids, batch.seen_offsets
    )
    targets = torch.cat(world.gather(batch.targets))
    ranks = []
    # Every rank cuts the histories alike, because the slices of the catalogue have one size but for the last ranks'.
    share = -(-recommender.num_items // world.size)
    padded = torch.nn.functional.pad(vectors, (0, 0, 0, share - vectors.shape[0]))
    for part in score_catalogue(states, seen, seen_history, targets, first_item, padded):
        scores = part.scores[:, : vectors.shape[0]]
        column = targets[part.history] - first_item
        owned = (column >= 0) & (column < scores.shape[1])
        own_column = column.clamp(0, max(0, scores.shape[1] - 1))[:, None]
        target_scores = torch.zeros(scores.shape[0], device=scores.device)
        if scores.shape[1]:
            target_scores = torch.where(owned, scores.gather(1, own_column).squeeze(1), 0.0)
        target_scores = world.sum(target_scores)[:, None]
        earlier = torch.arange(scores.shape[1], device=scores.device) < column[:, None]
        above = (scores > target_scores) | ((scores == target_scores) & earlier)
        ranks.append(1 + world.sum(above.sum(1)))
    return torch.cat(ranks) if ranks else targets
