"""Where the item tables live, and how many bytes they take there."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mme.config import Config, load_config
from mme.devices import DEVICES, GIB, gpu_here, in_words
from mme.errors import UserError
from mme.report.page import write_report
from mme.run.records import flaw
from mme.table_placement import (
    TablePlacement,
    choose_placement,
    in_lines,
    on_fullest_rank,
    predict,
    require_room,
    views_together,
)
from tests.launcher.command_line import launch
from tests.report.pages import Page
from tests.trained import train_small

H100, CPU = DEVICES["h100-80g"], replace(DEVICES["cpu"], memory=GIB, host_memory=GIB)
ROWS = 1_000_000


def configuration(*overrides: str) -> Config:
    model = ["model.num_tables=4", "model.embedding_dim=64", "model.moe.num_experts=0"]
    return load_config(None, ["data.path=unused", *model, *overrides])


@pytest.mark.parametrize(
    ("placement", "optimizer", "device_bytes", "host_bytes"),
    [
        # A part has 125,000 rows of 16 columns: 8 MB of weights.
        ("device", "adam", 24_000_000, 0),
        ("device", "rowwise_adagrad", 8_500_000, 0),
        ("device", "sgd", 8_000_000, 0),
        ("uvm", "adam", 0, 24_000_000),
        ("uvm", "rowwise_adagrad", 500_000, 8_000_000),  # FBGEMM keeps a state per row on the GPU
        # A quarter of the rows, and for all four tables 4 bytes a row and 16 a slot of the cache's index.
        ("uvm_caching", "adagrad", 2_000_000 + (500_000 + 500_000) // 4, 16_000_000),
    ],
)
def test_bytes_of_a_part(placement: str, optimizer: str, device_bytes: int, host_bytes: int) -> None:
    config = configuration(
        f"train.table_optimizer={optimizer}",
        f"parallel.table_placement={placement}",
        "parallel.table_cache_load_factor=0.25",
    )
    tables = predict(config, ROWS, 8, H100)
    assert [table.table for table in tables] == ["item_0", "item_1", "item_2", "item_3"]
    assert {(table.device_bytes, table.host_bytes) for table in tables} == {(device_bytes, host_bytes)}
    whole = on_fullest_rank(config, "row_wise", ROWS, 8, placement)
    assert (whole.device, whole.host) == (4 * device_bytes, 4 * host_bytes)


@pytest.mark.parametrize(
    ("tables", "sharding", "optimizer", "ranks", "views"),
    [
        (4, "row_wise", "adam", 8, 4),
        (4, "data_parallel", "sgd", 2, 4),
        (4, "row_wise", "rowwise_adagrad", 8, 1),
        (4, "row_wise", "dense_adam", 8, 1),
        (4, "column_wise", "adam", 8, 1),
        (4, "table_wise", "adam", 2, 2),
        (4, "table_wise", "adam", 8, 1),
        (4, "table_wise", "adam", 3, 1),  # two ranks have one table and one has two
        (8, "table_wise", "adagrad", 3, 1),  # three at most on one rank, which pairs would make four
        (1, "row_wise", "adam", 8, 1),
    ],
)
def test_tables_that_share_ids(tables: int, sharding: str, optimizer: str, ranks: int, views: int) -> None:
    config = configuration(f"model.num_tables={tables}", f"train.table_optimizer={optimizer}")
    assert views_together(config, sharding, ranks) == views


def test_a_stored_table_is_no_wider_than_fbgemm_s_kernels() -> None:
    assert views_together(configuration("model.embedding_dim=1024"), "row_wise", 8) == 4
    assert views_together(configuration("model.embedding_dim=2048"), "row_wise", 8) == 2
    assert views_together(configuration("model.embedding_dim=8192"), "row_wise", 8) == 1


def test_auto_leaves_the_gpu_only_when_tables_fill_it() -> None:
    """Adam's weights and states take 768 bytes a row of all tables, over 8 GPUs."""
    config = configuration()
    fits = int(0.8 * H100.memory / 768 * 8)
    assert choose_placement(config, fits - 8, 8, H100) == "device"
    assert choose_placement(config, fits + 8, 8, H100) == "uvm_caching"
    assert choose_placement(config, 2 * fits, 16, H100) == "device"
    assert choose_placement(configuration("train.table_optimizer=sgd"), fits + 8, 8, H100) == "device"
    assert choose_placement(configuration("parallel.table_sharding=data_parallel"), fits + 8, 8, H100) == "device"
    assert choose_placement(config, fits + 8, 8, CPU) == "device"
    narrow = configuration("parallel.table_dtype=bfloat16")  # which the cache does not have
    assert choose_placement(narrow, fits - 8, 8, H100) == "device"
    assert choose_placement(narrow, 2 * fits, 8, H100) == "uvm"


def test_what_the_device_lacks_is_rejected() -> None:
    for placement in ("uvm", "uvm_caching"):
        with pytest.raises(
            UserError, match=f"parallel.table_placement={placement} needs a GPU.*expected auto or device"
        ):
            choose_placement(configuration(f"parallel.table_placement={placement}"), ROWS, 2, CPU)


@pytest.mark.parametrize(
    ("placement", "rows", "message"),
    [
        (
            "device",
            10**9,
            r"needs 89\.4 GiB of GPU memory for the item tables .* and has 75\.0 GiB: expected uvm_caching",
        ),
        ("uvm", 3 * 10**9, r"needs 268\.2 GiB of host memory for the item tables .* and has 256\.0 GiB"),
        (
            "uvm_caching",
            28 * 10**8,
            r"needs 81\.1 GiB of GPU memory for the cache of the item tables, .*load_factor",
        ),
    ],
)
def test_tables_larger_than_the_memory_are_rejected(placement: str, rows: int, message: str) -> None:
    config = configuration(f"parallel.table_placement={placement}", "parallel.table_cache_load_factor=0.9")
    roomy = replace(H100, host_memory=1024 * GIB) if placement == "uvm_caching" else H100
    with pytest.raises(UserError, match=message):
        require_room(config, on_fullest_rank(config, "row_wise", rows, 8, placement), roomy, placement)
    require_room(config, on_fullest_rank(config, "row_wise", rows // 2, 8, placement), roomy, placement)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.table_placement=uvm", "parallel.table_sharding=data_parallel"],
        ["parallel.table_placement=uvm_caching", "train.table_optimizer=dense_adam"],
    ],
)
def test_host_memory_needs_tables_that_are_updated_by_row(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"needs tables that FBGEMM updates row by row, not (parallel|train)\."):
        configuration(*overrides)


def test_words_for_each_memory() -> None:
    def line(*overrides: str, device: object = H100) -> str:
        (found,) = in_lines(predict(configuration(*overrides), ROWS, 8, device))  # type: ignore[arg-type]
        return found.removeprefix("item_0 to item_3: each 1,000,000 × 16, row_wise on 8 of 8 ranks, ")

    assert line() == "in GPU memory (23 MiB on a rank)"
    assert line(device=CPU) == "in memory (23 MiB on a rank)"
    assert line("parallel.table_placement=uvm") == "in host memory (23 MiB on a rank)"
    assert line("parallel.table_placement=uvm_caching") == (
        "in host memory (23 MiB on a rank) with a cache of 20% of the rows in GPU memory (2 MiB)"
    )


def test_a_placement_is_read_back_from_its_record() -> None:
    tables = predict(configuration("parallel.table_placement=uvm_caching"), ROWS, 8, H100)
    record = {"kind": "run", "step": 0, "tables": [asdict(table) for table in tables]}
    assert flaw(record) is None
    assert [TablePlacement.from_record({**table, "later": 1}) for table in record["tables"]] == tables
    record["tables"][0]["placement"] = "moon"
    assert "tables.0.placement" in str(flaw(record))


@pytest.mark.slow
def test_plan_log_metrics_and_report_name_the_same_place(tmp_path: Path) -> None:
    trained = train_small(tmp_path)
    config = trained.run / "config.yaml"
    (line,) = in_lines(predict(load_config(config), 60, 1, DEVICES["cpu"]))
    assert line.startswith("item_0 to item_1: each 60 × 8, row_wise on 1 of 1 ranks, in memory (")
    assert line in (trained.run / "log.txt").read_text()
    records = map(json.loads, (trained.run / "metrics.jsonl").read_text().splitlines())
    tables = next(record["tables"] for record in records if record["kind"] == "run")
    assert in_lines(map(TablePlacement.from_record, tables)) == [line]
    assert line in Page(write_report(trained.run)).text
    here = ["--nproc-per-node", "1", "--gpu", "cpu", "--as-configured"]
    planned = launch("plan", "--config", str(config), *here, COLUMNS="250")
    assert line in planned.stdout, planned.stderr


def test_gpus_are_known_by_the_driver_s_name() -> None:
    found = gpu_here("NVIDIA H100 80GB HBM3", 79.1 * GIB, 8)
    assert found.memory_bytes_per_s == H100.memory_bytes_per_s
    assert found.memory == pytest.approx(0.95 * 79.1 * GIB)
    assert gpu_here("NVIDIA L4", 22 * GIB, 1).memory_bytes_per_s == DEVICES["a100-80g"].memory_bytes_per_s
    assert gpu_here("NVIDIA L4", 22 * GIB, 2).host_memory == pytest.approx(
        gpu_here("NVIDIA L4", 22 * GIB, 1).host_memory / 2
    )


def test_sizes_in_words() -> None:
    assert [in_words(size) for size in (5, 2048, 3 * 2**20, 1536 * 2**20)] == ["5 B", "2 KiB", "3 MiB", "1.5 GiB"]
