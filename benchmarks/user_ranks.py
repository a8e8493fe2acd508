"""Ranks the target of each test user by a run's best checkpoint and by popularity, for tests that pair users.

    python -m benchmarks.user_ranks runs/quickstart

writes `test_ranks.json` into the run's folder: model → ranks of the users, in the order of the data set. With `eval.seen=exclude`,
a target that the user has had before is in no list; its rank is `mme.evaluation.metrics.UNRANKED`, which is beyond any cut-off. It
runs in one process.
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
    """Ranks the targets of the test users and writes the ranks into the run's folder."""
    config = load_run_config(run)
    with process_group() as world:
        dataset, recommender, _ = load_trained(run, None, config, world)
        ranks = target_ranks(recommender, dataset, config, "test").by_model
    write_text(run / RANKS_JSON, json.dumps({name: values.tolist() for name, values in ranks.items()}), run)


if __name__ == "__main__":
    typer.run(main)
