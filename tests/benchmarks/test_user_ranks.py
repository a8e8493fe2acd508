"""The ranks of a run's users, also for models with features."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

from benchmarks import user_ranks
from mme.config import load_config, save_config
from mme.data.dataset import PreparedDataset
from mme.distributed.checkpoint_index import Progress
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import process_group
from mme.prepare.synthetic import prepare_synthetic

SMALL = ["data.max_seq_len=8", "model.num_tables=2", "model.embedding_dim=8", "model.moe.num_experts=0"]


def save_and_rank(run: Path) -> None:
    """Writes a checkpoint of an untrained model and returns its ranks."""
    config = load_config(None, [f"data.path={run}", "model.user_features=[user_id]", *SMALL])
    save_config(config, run / "config.yaml")
    dataset = PreparedDataset.open(run)
    with process_group() as world:
        recommender = Recommender(config, dataset.num_items, world, dataset.feature_sizes(["user_id"]))
        initialize_engine(recommender.decoder, config)  # creates the optimizer's state, which is also saved
        with CheckpointWriter(run, recommender, keep=1) as writer:
            writer.save(Progress(1, 0, 0))
    user_ranks.main(run)


def test_a_model_that_reads_features_has_ranks(tmp_path: Path) -> None:
    prepare_synthetic("quickstart", tmp_path, users=20, items=30, seed=3)
    # A separate process, because a process group leaves state behind.
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        pool.apply(save_and_rank, (tmp_path,))
    ranks = json.loads((tmp_path / user_ranks.RANKS_JSON).read_text())
    assert {name: len(of_users) for name, of_users in ranks.items()} == {"fuxi-mme": 20, "popularity": 20}
