"""Initial weights of the tables: a normal distribution truncated at two deviations, the same for any sharding."""

from __future__ import annotations

import math

import pytest
import torch

from mme.distributed.tables import INIT_ROWS, INIT_STD, ItemTables
from mme.distributed.world import World
from tests.distributed.processes import run_on
from tests.distributed.test_step import configuration, whole

ROWS = INIT_ROWS + 100


def initial(world: World, shardings: list[str], dim: int = 9, rows: int = 40) -> list:
    found = []
    for sharding in shardings:
        config = configuration(
            "train.table_optimizer=adam",
            f"parallel.table_sharding={sharding}",
            f"model.embedding_dim={2 * dim}",
            "model.num_heads=1",
        )
        tables = ItemTables(config, rows, world)
        found.append([(s.name, s.shape, s.offsets, s.tensor.clone()) for s in tables.weights()])
    return found


def test_weights_do_not_depend_on_the_sharding() -> None:
    """With odd columns and odd numbers of columns per piece, because two neighbours share a word of random bits."""
    (alone,) = run_on(1, initial, ["row_wise"])
    expected = whole([alone[0]])
    assert not torch.equal(expected["item_0"], expected["item_1"])
    shardings = ["row_wise", "table_wise", "data_parallel"]
    for found in zip(*run_on(2, initial, shardings), strict=True):
        for name, table in whole(list(found)).items():
            assert torch.equal(table, expected[name])
    ((wide,),) = run_on(1, initial, ["row_wise"], 512)
    for parts in zip(*run_on(2, initial, ["column_wise"], 512), strict=True):
        for name, table in whole(list(parts)).items():
            assert torch.equal(table, whole([wide])[name])


def some_rows(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tables = ItemTables(configuration("train.table_optimizer=adam"), ROWS, world)
    (shard, _) = tables.weights()
    all_rows = shard.tensor.clone()
    shard.tensor.fill_(7)
    chosen = torch.arange(ROWS) % 3 == 0
    tables.initialise(lambda rows: chosen[rows.start : rows.stop])
    return all_rows, shard.tensor.clone(), chosen


def test_selected_rows_get_their_initial_values_and_the_others_stay() -> None:
    ((all_rows, again, chosen),) = run_on(1, some_rows)
    assert torch.equal(again[chosen], all_rows[chosen])
    assert (again[~chosen] == 7).all()


def test_the_distribution_is_a_truncated_normal_one() -> None:
    ((parts,),) = run_on(1, initial, ["row_wise"], 8, ROWS)
    tables = torch.cat([table for *_, table in parts]).double() / INIT_STD
    assert tables.abs().max() <= 2 * (1 + 1e-6)
    density = math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(2 / math.sqrt(2))
    deviation = math.sqrt(1 - 4 * density)  # of a normal distribution truncated at two deviations
    assert tables.mean().item() == pytest.approx(0, abs=5 * deviation / tables.numel() ** 0.5)
    assert tables.std().item() == pytest.approx(deviation, rel=0.005)
    within_one = (tables.abs() < 1).double().mean().item()
    assert within_one == pytest.approx(math.erf(1 / math.sqrt(2)) / math.erf(2 / math.sqrt(2)), abs=0.005)
    assert tables.unique().numel() > 0.98 * tables.numel()  # 24 bits each
    centred = tables / tables.std()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[:, 2:] * centred[:, :-2]):
        assert abs(shifted.mean().item()) < 5 / shifted.numel() ** 0.5
