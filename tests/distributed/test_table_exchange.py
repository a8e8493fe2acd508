"""What ranks send to each other in a lookup: ids once for all tables, and rows in the configured data type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mme.distributed.tables import ItemTables
from mme.distributed.world import World
from mme.errors import UserError
from tests.distributed.processes import run_on
from tests.distributed.test_step import configuration, one_step, whole

IDS, ROWS = 200, 1000


def sent(world: World, cases: list[list[str]]) -> list[dict[str, int]]:
    """Bytes that this rank sends in a lookup and its backward, by data type, for each case."""
    real, found = dist.all_to_all_single, []

    def counted(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        kind = str(input.dtype).removeprefix("torch.")
        found[-1][kind] = found[-1].get(kind, 0) + input.numel() * input.element_size()
        return real(output, input, *args, **kwargs)

    dist.all_to_all_single = counted
    for overrides in cases:
        tables = ItemTables(configuration(*overrides), ROWS, world)
        found.append({})
        rows = tables.lookup(torch.arange(IDS) * 5 + world.rank)
        rows.backward(torch.ones_like(rows))
    dist.all_to_all_single = real
    return found


def tables_of(number: int, *overrides: str) -> list[str]:
    return [f"model.num_tables={number}", f"model.embedding_dim={8 * number}", *overrides]


def test_ids_are_sent_once_for_all_tables() -> None:
    """The same items: 1,600 bytes of ids, and with them the number of ids for each rank."""
    once = [tables_of(number, "train.table_optimizer=adam") for number in (1, 2, 4)]
    per_table = [tables_of(number, "train.table_optimizer=rowwise_adagrad") for number in (1, 2, 4)]
    for found in run_on(2, sent, [*once, *per_table]):
        ids = [case["int64"] for case in found]
        assert ids[0] == ids[1] == ids[2] < 8 * IDS + 100
        assert ids[3] == ids[0]
        assert ids[4] - 8 * IDS > 8 * IDS and ids[5] - 3 * 8 * IDS > 8 * IDS  # once for each table
        # Rows and gradients are as many in both: two directions of 200 rows of 8 numbers a table.
        assert [case["float32"] for case in found] == [2 * 4 * IDS * 8 * number for number in (1, 2, 4)] * 2


def strided(world: World) -> bool:
    tables = ItemTables(configuration("train.table_optimizer=adam"), ROWS, world)
    ids = torch.stack([torch.arange(IDS), torch.full((IDS,), ROWS - 1)], 1)[:, 0]
    return torch.equal(tables.lookup(ids), tables.lookup(ids.contiguous()))


def test_ids_may_be_a_column_of_a_matrix() -> None:
    assert all(run_on(2, strided)) and all(run_on(1, strided))


def test_tables_of_one_rank_share_ids() -> None:
    cases = [
        tables_of(4, f"parallel.table_sharding={kind}", "train.table_optimizer=sgd")
        for kind in ("row_wise", "table_wise")
    ]
    for by_rows, by_tables in run_on(2, sent, cases):
        assert by_rows["int64"] < 8 * IDS + 100  # each id to the rank with its row
        assert 2 * 8 * IDS < by_tables["int64"] < 2 * 8 * IDS + 100  # each id to both ranks, each with two tables


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_rows_and_gradients_are_exchanged_in_the_configured_type(sharding: str) -> None:
    cases = [
        tables_of(2, f"parallel.table_sharding={sharding}", f"parallel.exchange_dtype={dtype}")
        for dtype in ("float32", "bfloat16", "float16")
    ]
    both = 2 * 2 * IDS * 8  # numbers, there and back
    for plain, brain, half in run_on(2, sent, cases):
        assert plain["float32"] == 4 * both
        assert brain["bfloat16"] == 2 * both and "float32" not in brain
        assert half["float16"] == half["bfloat16"] == both and "float32" not in half
        assert plain["int64"] == brain["int64"] == half["int64"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_agree_within_the_rounding_of_the_exchange(dtype: str) -> None:
    """bfloat16 has 8 bits and float16 has 11: relative errors of a row of 2**-9 and 2**-12, of its gradient 2**-9.

    Without experts, whose choice may change with the last bit.
    """
    dense = ["model.moe.num_experts=0"]
    ((loss, _, start),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], ["train.table_lr=1e-30", *dense])
    ((_, _, exact),) = run_on(1, one_step, [[0, 1, 2, 3, 4]], dense)
    results = run_on(2, one_step, [[0, 3], [1, 2, 4]], [f"parallel.exchange_dtype={dtype}", *dense])
    assert results[0][0] == results[1][0] == pytest.approx(loss, rel=2e-3)
    assert results[0][0] != loss
    weights, before, after = whole([parts for _, _, parts in results]), whole([start]), whole([exact])
    for name in ("tables/item_0", "tables/item_1"):
        moved = after[name] - before[name]
        assert (weights[name] - after[name]).norm() < 0.02 * moved.norm(), name


def test_replicated_tables_exchange_no_rows() -> None:
    with pytest.raises(UserError, match="table_sharding=data_parallel exchanges no rows"):
        configuration("parallel.exchange_dtype=float16", "parallel.table_sharding=data_parallel")
