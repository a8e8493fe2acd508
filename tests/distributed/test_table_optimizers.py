"""Adam of the tables, for looked-up rows or for all rows, equals a float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mme.config import load_config
from mme.distributed.tables import INIT_STD, ItemTables
from mme.distributed.world import World
from mme.errors import UserError
from tests.distributed.processes import run_on
from tests.distributed.test_step import configuration, whole

ROWS, VIEWS, DIM = 12, 2, 8
LR, BETAS, EPS = 0.03, (0.9, 0.98), 1e-8
# The ids that each of two ranks looks up, by step: some on both, some in only one step, and once none on one rank.
LOOKUPS = [([0, 3, 7], [3, 11]), ([1, 3], []), ([0, 7], [2, 3, 11]), ([3], [3])]


def gradient(step: int, rank: int) -> Tensor:
    """(n, M, d) gradients of the rows that a rank looks up in a step: very different sizes, and zero for the first row."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = torch.randn(len(LOOKUPS[step][rank]), VIEWS, DIM, generator=generator) * 10.0 ** (rank - 1)
    rows[:1] = 0
    return rows


def steps(world: World, optimizer: str, sharding: str) -> tuple[list, list]:
    """This rank's parts of the weights before all steps, and of weights and states after them."""
    config = configuration(
        f"train.table_optimizer={optimizer}",
        f"train.table_lr={LR}",
        f"parallel.table_sharding={sharding}",
        f"model.embedding_dim={VIEWS * DIM}",
    )
    tables = ItemTables(config, ROWS, world)

    def parts(shards: list) -> list:
        return [(shard.name, shard.shape, shard.offsets, shard.tensor.clone()) for shard in shards]

    before = parts(list(tables.weights()))
    tables.set_optimizer_step(0)
    for step, lookups in enumerate(LOOKUPS):
        tables.set_lr(LR * (step + 1))
        # Two ranks' lookups are one rank's two halves; gradients are averaged over the ranks.
        ranks = [world.rank] if world.size == 2 else [0, 1]
        ids = sorted({i for rank in ranks for i in lookups[rank]})
        rows = torch.zeros(len(ids), VIEWS, DIM)
        for rank in ranks:
            rows[[ids.index(i) for i in lookups[rank]]] += gradient(step, rank) / len(ranks)
        with torch.no_grad():
            tables.lookup(torch.arange(ROWS))  # as in an evaluation, which is no step of the optimizer
        tables.set_optimizer_step(step)
        tables.lookup(torch.tensor(ids, dtype=torch.int64)).backward(rows)
        tables.step()
    return before, parts([*tables.weights(), *tables.optimizer_states()])


def reference(weight: Tensor, table: int, dense: bool) -> dict[str, Tensor]:
    """Adam in float64, of the rows that any rank looked up (as FBGEMM on CUDA) or of all rows (as torch.optim)."""
    weight = weight.double()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, lookups in enumerate(LOOKUPS):
        total = torch.zeros_like(weight)
        for rank, ids in enumerate(lookups):
            for i, row in zip(ids, gradient(step, rank)[:, table].double(), strict=True):
                total[i] += row / 2
        for i in range(ROWS) if dense else sorted({*lookups[0], *lookups[1]}):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * total[i]
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * total[i] ** 2
            m_hat, v_hat = m[i] / (1 - BETAS[0] ** (step + 1)), v[i] / (1 - BETAS[1] ** (step + 1))
            weight[i] -= LR * (step + 1) * m_hat / (v_hat.sqrt() + EPS)
    return {"": weight, "/exp_avg": m, "/exp_avg_sq": v}


def all_steps(world: World, cases: list[tuple[str, str]]) -> list:
    return [steps(world, *case) for case in cases]


@pytest.mark.parametrize("processes", [1, 2])
def test_adam_is_the_reference_for_every_sharding(processes: int) -> None:
    cases = list(itertools.product(["adam", "dense_adam"], ["row_wise", "column_wise", "table_wise", "data_parallel"]))
    for case, results in zip(cases, zip(*run_on(processes, all_steps, cases), strict=True), strict=True):
        before, after = (whole([result[which] for result in results]) for which in (0, 1))
        assert len(after) == 3 * VIEWS, case
        assert 0 < before["item_0"].abs().max() <= 2 * INIT_STD
        for table in range(VIEWS):
            expected = reference(before[f"item_{table}"], table, dense=case[0] == "dense_adam")
            for state, value in expected.items():
                found = after[f"item_{table}{state}"]
                torch.testing.assert_close(
                    found.double(), value, rtol=2e-6, atol=2e-8, msg=lambda m, c=case, s=state: f"{c} {s}: {m}"
                )


def test_adam_leaves_the_rows_of_other_batches_alone() -> None:
    """Row 5 is never looked up. Row 11 is looked up in two steps of four, and changes in the others only if all rows do."""
    (((before, after),),) = run_on(1, all_steps, [("adam", "row_wise")])
    start, end = whole([before])["item_0"], whole([after])["item_0"]
    assert torch.equal(start[5], end[5])
    (((_, after),),) = run_on(1, all_steps, [("dense_adam", "row_wise")])
    assert not torch.equal(whole([after])["item_0"][11], end[11])


def columns_of(world: World, sharding: str) -> set[int]:
    """The widths of the pieces in which tables of 512 columns are stored."""
    config = configuration(
        "train.table_optimizer=rowwise_adagrad",
        f"parallel.table_sharding={sharding}",
        "model.num_tables=1",
        "model.embedding_dim=512",
    )
    return {shard.tensor.shape[1] for shard in ItemTables(config, ROWS, world).weights()}


def test_rowwise_adagrad_keeps_rows_whole() -> None:
    """A row split by columns would have one state per piece, and another sharding could not resume it."""
    with pytest.raises(UserError, match=r"column_wise: train\.table_optimizer=rowwise_adagrad has one state per row"):
        load_config(
            None, ["data.path=unused", "train.table_optimizer=rowwise_adagrad", "parallel.table_sharding=column_wise"]
        )
    assert all(widths == {512} for widths in run_on(2, columns_of, "auto"))
