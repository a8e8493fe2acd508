"""The rank of each test user's target under a run's best checkpoint and under popularity, for tests that pair users.

    python -m benchmarks.user_ranks runs/quickstart

writes `test_ranks.json` into the run's folder: model → ranks, users in the order of the data set. A target that is in no list
(`eval.seen=exclude`, an item that the user has had before) has the rank `mme.evaluation.metrics.UNRANKED`, a number beyond
any cut-off. One process.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from mme.config import load_run_config
from mme.distributed.world import process_group
from mme.evaluation.evaluate import load_trained, target_ranks
from mme.files import write_text

RANKS_JSON = "test_ranks.json"


def main(run: Path) -> None:
    """Ranks the test users' targets and keeps the ranks in the run's folder."""
    config = load_run_config(run)
    with process_group() as world:
        dataset, recommender, _ = load_trained(run, None, config, world)
        ranks = target_ranks(recommender, dataset, config, "test").by_model
    write_text(run / RANKS_JSON, json.dumps({name: values.tolist() for name, values in ranks.items()}), run)


if __name__ == "__main__":
    typer.run(main)
