"""The owners of rows hold the gradients of a lookup and know their norm, also an owner whose rows nobody looks up."""

from __future__ import annotations

import torch

from mme.distributed.clipping import OwnedGradients
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, configuration


def norms(world: World, ids_by_rank: list[list[int]]) -> tuple[float, float]:
    """This rank's sum of squares for gradients of 1 on rank 0 and 2 on rank 1, and how far its rows have moved."""
    config = configuration("parallel.table_sharding=row_wise")
    tables = Recommender(config, NUM_ITEMS, world).tables
    tables.set_lr(1.0)
    owned = OwnedGradients(tables)
    before = [shard.tensor.clone() for shard in tables.weights()]
    rows = tables.lookup(torch.tensor(ids_by_rank[world.rank]))
    rows.backward(torch.full_like(rows, world.rank + 1.0))
    squares = owned.squared_norm().item()
    owned.scale(0.5)
    owned.apply()
    tables.step()
    moved = sum(
        (shard.tensor - old).double().square().sum().item() for shard, old in zip(tables.weights(), before, strict=True)
    )
    return squares, moved


def test_a_row_that_two_ranks_looked_up_is_summed_by_its_owner() -> None:
    # All rows belong to rank 0. Averaged gradients per element: 1/2 for row 0, 3/2 for row 1, 2/2 for row 2; 16 elements a row.
    (first, moved), nothing = run_on(2, norms, [[0, 1], [1, 2]])
    assert first == 16 * (0.25 + 2.25 + 1.0)
    assert abs(moved - first / 4) < 1e-4
    assert nothing == (0.0, 0.0)
