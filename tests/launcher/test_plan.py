"""`launcher plan`: its counts against the real decoder, and what changes with ranks and settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.plan import GPUS, Shape, memory_parts, time_parts
from mme.config import load_config
from mme.errors import UserError
from tests.launcher.command_line import CONFIG, REPOSITORY, launch, the_error


def shape(ranks: int, *overrides: str, items: int = 100_000) -> Shape:
    return Shape(load_config(REPOSITORY / CONFIG, list(overrides)), ranks, min(ranks, 8), items)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.moe.num_experts=0",),
        ("model.moe.placement=[1]", "model.num_heads=2", "model.positions=shared"),
        ("model.dqk=5", "model.dv=7", "model.ffn_multiplier=1.7"),
    ],
)
def test_weights_are_those_of_the_decoder(overrides: tuple[str, ...]) -> None:
    from mme.model.decoder import Decoder

    counted = shape(1, *overrides)
    decoder = Decoder(counted.config)
    assert counted.dense_parameters + counted.expert_parameters == sum(p.numel() for p in decoder.parameters())


def test_sharded_parts_shrink_with_the_ranks_and_the_others_do_not() -> None:
    one, eight = (memory_parts(shape(ranks)) for ranks in (1, 8))
    for part in ("item tables", "tables' optimizer", "experts and their gradients", "decoder's optimizer"):
        assert eight[part] == pytest.approx(one[part] / 8)
    assert eight["decoder and its gradients"] == one["decoder and its gradients"]
    whole = memory_parts(shape(8, "parallel.table_sharding=data_parallel"))
    assert whole["item tables"] == one["item tables"] == 100_000 * 64 * 4


def test_precision_recomputation_and_parts_take_less_memory() -> None:
    def kept(*overrides: str) -> float:
        return memory_parts(shape(1, "model.num_blocks=8", *overrides))["activations: attention"]

    assert kept("train.precision=bfloat16") == pytest.approx(kept() / 2)
    assert kept("train.micro_batches=4") == pytest.approx(kept() / 4)
    assert kept() / 8 < kept("train.recompute=blocks") < kept() / 3
    gpu = GPUS["h100-80g"]
    float32, bfloat16 = (time_parts(shape(1, f"train.precision={p}"), 1, gpu) for p in ("float32", "bfloat16"))
    assert bfloat16["attention"] < float32["attention"]


def test_other_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.block \(sasrec\): the plan knows fuxi alone"):
        shape(1, "model.block=sasrec", "model.moe.num_experts=0")


def test_a_node_more_brings_the_network_in() -> None:
    gpu = GPUS["h100-80g"]
    one, two = time_parts(shape(8), 1, gpu), time_parts(shape(16), 2, gpu)
    assert two["tables: exchange"] > 2 * one["tables: exchange"] > 0
    assert two["attention"] == one["attention"]
    alone = time_parts(shape(1), 1, gpu)
    assert alone["tables: exchange"] == alone["experts: exchange"] == alone["gradients: all-reduce"] == 0


def test_attention_grows_with_the_square_of_the_length() -> None:
    gpu = GPUS["a100-80g"]
    short, long = (time_parts(shape(1, f"data.max_seq_len={n}", "data.batch_size=8"), 1, gpu) for n in (2048, 8192))
    assert long["attention"] == pytest.approx(16 * short["attention"], rel=0.01)
    assert long["projections"] == pytest.approx(4 * short["projections"])


def test_the_page_shows_parts_totals_and_assumptions() -> None:
    done = launch("plan", "--config", CONFIG, "--nnodes", "2", "--gpu", "a100-80g", "--items", "50000", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    for text in ["2 × 8 a100-80g, 50,000 items", "row_wise over 16 ranks", "1 on each of 8 ranks, 2 copies"]:
        assert text in done.stdout
    assert done.stdout.count("│ total") == 2
    assert "a cost model, not a measurement" in done.stdout
    assert "does not fit" not in done.stdout
    large = launch("plan", "--config", CONFIG, "--nproc-per-node", "1", "--items", "4000000000")
    assert "does not fit: " in large.stdout


def test_the_number_of_items_comes_from_the_data_set(tmp_path: Path) -> None:
    arguments = ["plan", "--config", CONFIG, f"data.path={tmp_path}"]
    assert "dataset.json: no num_items to be read there" in the_error(launch(*arguments))
    (tmp_path / "dataset.json").write_text(json.dumps({"num_items": 1234}))
    assert "1,234 items" in launch(*arguments).stdout
