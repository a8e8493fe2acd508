"""The rank of each test user's target under a run's best checkpoint and under popularity, for tests that pair users.

    python -m benchmarks.user_ranks runs/quickstart

writes `test_ranks.json` into the run's folder: model → ranks, users in the order of the data set. One process.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from mme.config import load_run_config
from mme.data.dataset import PreparedDataset
from mme.distributed.checkpoint import load_weights
from mme.distributed.groups import process_group
from mme.distributed.recommender import Recommender
from mme.evaluate import target_ranks

RANKS_FILE = "test_ranks.json"


def main(run: Path) -> None:
    """Ranks the test users' targets and keeps the ranks in the run's folder."""
    config = load_run_config(run)
    with process_group() as world:
        dataset = PreparedDataset.open(config.data.path, config.data.cache_dir)
        features = config.model.feature_columns
        recommender = Recommender(config, dataset.num_items, world, dataset.feature_sizes(features))
        load_weights(run, None, recommender, dataset.numbering_sha256(features))
        ranks = target_ranks(recommender, dataset, config, "test")
    partial = run / f"{RANKS_FILE}.partial"
    partial.write_text(json.dumps({name: values.tolist() for name, values in ranks.items()}))
    partial.replace(run / RANKS_FILE)


if __name__ == "__main__":
    typer.run(main)
