"""A run resumes on more or fewer processes and with other layouts of experts and tables, with the same losses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mme.config import load_config
from mme.data.batch import SequenceBatch
from mme.data.dataset import PreparedDataset
from mme.distributed.world import World
from mme.errors import Preempted
from mme.run.preemption import Preemption
from mme.training import Training
from tests.distributed.processes import run_on
from tests.test_recovery import QUICKSTART, data
from tests.test_train import SMALL, losses

__all__ = ["data"]  # a fixture
JOB = [*SMALL, "data.batch_size=8", "model.dropout=0.3", "train.epochs=3"]

Seen = list[tuple[int, list[int]]]  # step, and the users of this rank's batch


def train(world: World, data: str, run: str, overrides: list[str], stop_after: int | None) -> Seen:
    """Trains to the end, or stops and saves after the step ``stop_after``."""
    config = load_config(QUICKSTART, [f"data.path={data}", f"output_dir={run}", *JOB, *overrides])
    seen = []
    with Preemption() as preemption:
        training = Training(config, PreparedDataset.open(Path(data)), world, preemption)
        backward = training.step.backward

        def watched(step: int, batch: SequenceBatch, votes: Any) -> Any:
            seen.append((step, batch.user_rows.tolist()))
            return backward(step, batch, [step + 1 == stop_after, *votes[1:]])

        training.step.backward = watched  # type: ignore[method-assign]
        try:
            training.run()
        except Preempted:
            assert stop_after is not None
    return seen


def by_step(seen_by_rank: list[Seen]) -> dict[int, list[int]]:
    """The users of each global batch, sorted."""
    users: dict[int, list[int]] = {}
    for step, rows in itertools.chain(*seen_by_rank):
        users[step] = sorted([*users.get(step, []), *rows])
    return users


@pytest.mark.slow
def test_on_other_numbers_of_processes_the_losses_stay_the_same(data: Path, tmp_path: Path) -> None:
    """Resumes twice within an epoch with dropout, sampled negatives and other layouts: each sequence once, equal losses."""
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    wanted = by_step(run_on(2, train, str(data), str(whole), [], None))
    found: dict[int, list[int]] = {}
    for processes, stop_after, layout in [
        (2, 4, []),
        (1, 11, ["parallel.table_sharding=table_wise", "parallel.expert_parallel_size=1"]),
        (4, None, ["parallel.table_sharding=column_wise", "parallel.expert_parallel_size=4", "parallel.zero_stage=2"]),
    ]:
        found |= by_step(run_on(processes, train, str(data), str(changing), layout, stop_after))
    assert found == wanted
    epochs = [sorted(itertools.chain(*(found[step] for step in range(start, start + 7)))) for start in (0, 7, 14)]
    assert epochs[0] == epochs[1] == epochs[2] == sorted(set(epochs[0]))
    assert len(losses(changing)) == 21
    for (step, loss), (_, as_whole) in zip(losses(changing), losses(whole), strict=True):
        assert loss == pytest.approx(as_whole, rel=1e-6), step
    log = (changing / "log.txt").read_text()
    assert "the global batch remains 2 × 8 sequences, now divided among 1 processes" in log
    assert "the global batch remains 2 × 8 sequences, now divided among 4 processes" in log
