"""`launcher plan`: its counts match the real decoder and change with ranks and settings as they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.job import items_of
from launcher.memory import VECTORS, Memory, evaluation_memory, memory_of, step_memory
from launcher.plan import choice, layouts, predict
from launcher.shape import Shape
from launcher.step_time import time_parts
from mme.config import load_config
from mme.devices import DEVICES, Device
from mme.errors import UserError
from tests.launcher.command_line import CONFIG, REPOSITORY, launch, the_error

H100, A100 = DEVICES["h100-80g"], DEVICES["a100-80g"]


# Independent of the quick start's values.
MODEL = (
    "model.num_tables=2 model.embedding_dim=64 model.dqk=32 model.dv=32 model.ffn_multiplier=2 model.moe.placement=[] "
    "train.table_optimizer=adam"
)


def shape(ranks: int, *overrides: str, items: int = 100_000) -> Shape:
    return Shape(load_config(REPOSITORY / CONFIG, [*MODEL.split(), *overrides]), ranks, min(ranks, 8), items)


def seconds(planned: Shape, device: Device = H100) -> dict[str, float]:
    return {name: part.seconds for name, part in time_parts(planned, device).items()}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.moe.num_experts=0",),
        ("model.moe.placement=[1]", "model.num_heads=2", "model.positions=shared"),
        ("model.moe.router=all_views",),
        ("model.dqk=5", "model.dv=7", "model.ffn_multiplier=1.7"),
    ],
)
def test_weights_are_those_of_the_decoder(overrides: tuple[str, ...]) -> None:
    from mme.model.decoder import Decoder

    counted = shape(1, *overrides)
    decoder = Decoder(counted.config)
    assert counted.dense_parameters + counted.expert_parameters == sum(p.numel() for p in decoder.parameters())


def test_sharded_parts_shrink_with_the_ranks_and_the_others_do_not() -> None:
    one, eight = (memory_of(shape(ranks), H100).parts for ranks in (1, 8))
    for part in ("item tables", "tables' optimizer", "experts", "decoder's optimizer"):
        assert eight[part] == pytest.approx(one[part] / 8)
    assert eight["decoder"] == one["decoder"]
    whole = memory_of(shape(8, "parallel.table_sharding=data_parallel"), H100).parts
    assert whole["item tables"] == one["item tables"] == 100_000 * 64 * 4


def test_tables_are_split_by_columns_as_torchrec_splits_them() -> None:
    from torchrec.distributed.sharding_plan import _get_block_size_for_cw_shard

    for width in (16, 128, 192, 256, 384, 1000, 1024):
        overrides = ["model.num_tables=1", f"model.embedding_dim={width}", "parallel.table_sharding=column_wise"]
        parts = shape(8, *overrides).table_parts
        assert parts.columns == _get_block_size_for_cw_shard(width, None)
        assert (parts.number * parts.columns, parts.rows) == (width, 100_000)


def test_more_ranks_than_tables_leave_some_without() -> None:
    planned = shape(8, "model.num_tables=4", "parallel.table_sharding=table_wise")
    assert planned.table_elements == 100_000 * 16
    assert planned.table_skew == 2
    by_rows = shape(8, "model.num_tables=4")
    assert seconds(planned)["tables: exchange"] > 1.5 * seconds(by_rows)["tables: exchange"]


def test_precision_recomputation_and_parts_take_less_memory() -> None:
    def kept(*overrides: str) -> Memory:
        return step_memory(shape(1, "model.num_blocks=8", "loss.num_negatives=1", *overrides), H100)

    part = "activations: attention"
    assert kept("train.precision=bfloat16").parts[part] == pytest.approx(kept().parts[part] / 2, rel=0.02)
    assert kept("train.micro_batches=4").parts[part] == pytest.approx(kept().parts[part] / 4)
    assert kept().parts[part] / 8 < kept("train.recompute=blocks").parts[part] < kept().parts[part] / 3
    assert seconds(shape(1, "train.precision=bfloat16"))["attention"] < seconds(shape(1))["attention"]
    assert seconds(shape(1, "train.recompute=blocks"))["attention"] > seconds(shape(1))["attention"]


def test_the_peak_is_that_of_the_evaluation_if_it_needs_more_than_a_step() -> None:
    small = shape(1, "data.batch_size=1", "data.eval_batch_size=512")
    assert memory_of(small, H100) == evaluation_memory(small, H100)
    assert memory_of(small, H100).total > step_memory(small, H100).total
    large = shape(1, "data.batch_size=512", "data.eval_batch_size=1")
    assert memory_of(large, H100) == step_memory(large, H100)


def test_an_evaluation_copies_the_vectors_of_tables_that_are_not_split_by_rows() -> None:
    in_place, copied = (
        evaluation_memory(shape(4, f"parallel.table_sharding={sharding}"), H100).parts[VECTORS]
        for sharding in ("row_wise", "table_wise")
    )
    assert (in_place, copied) == (25_000 * 2 * 4, 25_000 * 64 * 4)  # a length for each of two views


def test_other_blocks_are_rejected() -> None:
    with pytest.raises(UserError, match=r"model\.block \(sasrec\): plan supports only fuxi"):
        shape(1, "model.block=sasrec", "model.moe.num_experts=0")


def test_a_second_node_adds_network_time() -> None:
    one, two, alone = seconds(shape(8)), seconds(shape(16)), seconds(shape(1))
    assert two["tables: exchange"] > 2 * one["tables: exchange"] > 0
    assert two["attention"] == one["attention"]
    assert not {"tables: exchange", "experts: exchange", "gradients: all-reduce"} & alone.keys()


def test_small_messages_cost_latency() -> None:
    few, many = (time_parts(shape(ranks, "data.batch_size=1"), H100)["gradients: all-reduce"] for ranks in (16, 1024))
    assert few.bound == many.bound == "latency"
    assert many.seconds == pytest.approx(few.seconds * 10 / 4, rel=0.05)  # proportional to the depth of a tree


def test_attention_grows_with_the_square_of_the_length() -> None:
    short, long = (
        seconds(shape(1, f"data.max_seq_len={length}", "data.batch_size=8"), A100) for length in (2048, 8192)
    )
    assert long["attention"] == pytest.approx(16 * short["attention"], rel=0.01)
    assert long["projections"] == pytest.approx(4 * short["projections"])


def test_the_choice_is_the_fastest_that_fits() -> None:
    # Small tables are fastest as copies on every rank; large ones fit only when split by rows.
    small = shape(8, "train.table_optimizer=sgd", "loss.num_negatives=512", items=1000)
    found = layouts(small, H100)
    assert len(found) == 4 * 4  # shardings × divisors of 8
    assert choice(found, None, H100).shape.config.parallel.table_sharding == "data_parallel"
    large = layouts(shape(8, "parallel.table_sharding=data_parallel", items=500_000_000), H100)
    chosen = choice(large, None, H100)
    assert chosen.shape.config.parallel.table_sharding == "row_wise"
    assert chosen.memory.total < H100.memory < min(x.memory.total for x in large if not x.shape.is_sharded)


@pytest.mark.parametrize(
    "override", ["parallel.table_dtype=float16", "parallel.exchange_dtype=bfloat16", "parallel.table_placement=uvm"]
)
def test_only_layouts_that_training_accepts_are_compared(override: str) -> None:
    found = {layout.shape.config.parallel.table_sharding for layout in layouts(shape(8, override), H100)}
    assert found == {"row_wise", "column_wise", "table_wise"}


def test_bfloat16_tables_go_to_host_memory_without_a_cache() -> None:
    arguments = ["plan", "--config", CONFIG, "--items", "1000000000", "--host-memory", "4096"]
    refused = launch(*arguments, "parallel.table_dtype=bfloat16", "parallel.table_placement=device").stderr
    assert "what fits: parallel.table_placement=uvm or --nnodes" in refused


def test_the_configured_layout_stays_unless_another_is_much_better() -> None:
    for size in (1, 4, 8):
        configured = shape(8, f"parallel.expert_parallel_size={size}", items=10_000_000)
        assert choice(layouts(configured, H100), configured, H100) == predict(configured, H100)


def test_the_page_shows_parts_totals_and_assumptions() -> None:
    done = launch("plan", "--config", CONFIG, "--nnodes", "2", "--gpu", "a100-80g", "--items", "50000", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    for text in [
        "2 × 8 a100-80g, 50,000 items",
        "item_0 to item_1: each 50,000 × 64, row_wise on 16 of 16 ranks, in GPU memory",
        "1 on each of 8 ranks, 2 copies",
    ]:
        assert text in done.stdout
    assert done.stdout.count("│ total") == 3  # memory, host memory, time
    assert "this is a cost model" in done.stdout
    assert "to train with this layout: parallel.table_sharding=row_wise parallel.expert_parallel_size=8" in done.stdout
    assert "does not fit" not in done.stdout


def test_a_job_that_cannot_fit_is_rejected_with_the_shortfall_and_what_would_fit() -> None:
    arguments = ["plan", "--config", CONFIG, "--nproc-per-node", "8", "--items", "2000000000"]
    arguments += ["parallel.table_placement=device"]
    done = launch(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: does not fit: the fullest rank needs ")
    assert "the largest part is tables' optimizer" in line
    nodes = line[line.index("--nnodes") :].split()[:2]
    assert launch(*arguments, *nodes).returncode == 0
    assert launch(*arguments, "--nnodes", str(int(nodes[1]) // 2)).returncode == 2
    batch = launch("plan", "--config", CONFIG, "--items", "100000000", "data.batch_size=100000").stderr
    smaller = batch[batch.index("data.batch_size=") :].split()[0]
    assert launch("plan", "--config", CONFIG, "--items", "100000000", smaller).returncode == 0


def test_tables_too_large_for_the_gpus_go_to_host_memory_with_a_cache() -> None:
    arguments = ["plan", "--config", CONFIG, "--items", "1000000000", "--host-memory", "4096"]
    done = launch(*arguments, COLUMNS="250")
    assert done.returncode == 0, done.stderr
    assert "in host memory (89.4 GiB on a rank) with a cache of 20% of the rows in GPU memory (6.4 GiB)" in done.stdout
    refused = launch(*arguments, "parallel.table_placement=device").stderr
    assert "does not fit" in refused and "what fits: parallel.table_placement=uvm_caching or --nnodes" in refused
    small_host = launch(*arguments[:-1], "512").stderr
    assert "357.6 GiB of host memory (item tables 178.8 GiB, copy for a checkpoint 178.8 GiB)" in small_host
    assert "more than the 64.0 GiB" in small_host
    assert "--host-memory -1.0: expected a positive number of GiB" in the_error(launch(*arguments[:-1], "-1"))
    on_cpu = the_error(
        launch("plan", "--config", CONFIG, "--gpu", "cpu", "--items", "9", "parallel.table_placement=uvm")
    )
    assert "parallel.table_placement=uvm needs a GPU" in on_cpu


def test_rows_in_host_memory_cross_the_link() -> None:
    part = "tables: rows read and updated"
    on_gpu, cached, on_host = (
        time_parts(shape(8, f"parallel.table_placement={placement}"), H100)[part]
        for placement in ("device", "uvm_caching", "uvm")
    )
    assert on_gpu.seconds < cached.seconds < on_host.seconds
    assert (on_gpu.bound, on_host.bound) == ("memory", "bandwidth")
    # Three copies of the rows, and two states read and written, at half of 64 GB/s; in a cache, a fifth of the rows.
    assert cached.seconds / on_host.seconds == pytest.approx((0.8 * 3 + 4) / (3 + 4))


def test_as_configured_keeps_the_configured_layout() -> None:
    arguments = ["plan", "--config", CONFIG, "--items", "1000", "--as-configured"]
    done = launch(*arguments, "parallel.table_sharding=data_parallel", "parallel.expert_parallel_size=2", COLUMNS="160")
    assert "data_parallel on 8 of 8 ranks" in done.stdout
    assert "4 on each of 2 ranks, 4 copies" in done.stdout
    assert "Layouts" not in done.stdout
    assert "leave out --as-configured" in the_error(launch(*arguments, "parallel.table_sharding=auto"))


def test_the_number_of_items_comes_from_the_data_set(tmp_path: Path) -> None:
    arguments = ["plan", "--config", CONFIG, f"data.path={tmp_path}"]
    assert "dataset.json: num_items cannot be read" in the_error(launch(*arguments))
    for text in ("[]", '{"num_items": 1e999}', '{"num_items": -1}'):
        (tmp_path / "dataset.json").write_text(text)
        assert "dataset.json: " in the_error(launch(*arguments))
    (tmp_path / "dataset.json").write_text(json.dumps({"num_items": 1234}))
    assert "1,234 items" in launch(*arguments).stdout


def test_features_have_rows_in_the_tables_too(tmp_path: Path) -> None:
    from mme.model.feature_rows import FeatureRows

    (tmp_path / "dataset.json").write_text(json.dumps({"num_items": 1000, "num_users": 50, "features": {"tab": 4}}))
    overrides = ["model.event_features=[tab]", "model.user_features=[user_id]", f"data.path={tmp_path}"]
    config = load_config(REPOSITORY / CONFIG, overrides)
    assert items_of(config) == FeatureRows(config.model, 1000, {"tab": 5, "user_id": 51}).num_rows
    unknown = launch("plan", "--config", CONFIG, f"data.path={tmp_path}", "model.event_features=[rating]")
    assert "dataset.json: has no rating" in the_error(unknown)


def test_gpus_compute_in_bfloat16_by_default() -> None:
    on_gpu = replace(shape(1), device_type="cuda")
    assert (on_gpu.precision, on_gpu.number_bytes) == ("bfloat16", 2)
    assert (shape(1).precision, shape(1).number_bytes) == ("float32", 4)
    exact = replace(shape(1, "train.precision=float32"), device_type="cuda")
    assert seconds(exact)["projections"] > seconds(on_gpu)["projections"]


@pytest.mark.parametrize("name, faster_than", [("h200", "h100-80g"), ("b200", "h200"), ("h100-80g", "l40s")])
def test_newer_gpus_are_faster_and_larger(name: str, faster_than: str) -> None:
    quick, slow = (sum(seconds(shape(8), DEVICES[kind]).values()) for kind in (name, faster_than))
    assert quick < slow
    assert DEVICES[name].memory > DEVICES[faster_than].memory
