"""Ranges of the keys, and values that other modules derive from the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from mme.config import Config, DataConfig, LossConfig, ModelConfig, MoEConfig, flat, load_config, warnings
from mme.config.key import RANGE, Range, keys_of
from mme.errors import UserError

WITH_RANGE = {name: field.metadata[RANGE] for name, field, _ in keys_of(Config()) if RANGE in field.metadata}


@pytest.mark.parametrize("name", WITH_RANGE)
def test_a_number_out_of_range_is_named(name: str) -> None:
    """Values just beyond each bound are rejected, and inclusive bounds are accepted."""
    allowed = WITH_RANGE[name]
    outside = [allowed.above, allowed.below]
    outside += [
        None if bound is None else bound + step for bound, step in ((allowed.at_least, -1), (allowed.at_most, 1))
    ]
    assert any(bound is not None for bound in outside)
    for value in (bound for bound in outside if bound is not None):
        with pytest.raises(UserError, match=rf"^{name} \({value}(\.0)?\) must be {allowed.phrase()}$"):
            load_config(None, ["data.path=unused", f"{name}={value}"])
    for value in (bound for bound in (allowed.at_least, allowed.at_most) if bound is not None):
        assert flat(load_config(None, ["data.path=unused", f"{name}={value}"]))[name] == value


def test_ranges_describe_their_bounds() -> None:
    assert Range(above=0).phrase() == "positive"
    assert Range(above=0).notation() == "> 0"
    assert Range(at_least=0, below=1).phrase() == "at least 0 and below 1"
    assert Range(at_least=0, below=1).notation() == "≥ 0, < 1"
    assert Range(above=1, at_most=2).phrase() == "above 1 and at most 2"


def test_configurations_do_not_share_lists() -> None:
    first = Config(data=DataConfig(path="unused"))
    first.train.profile_ranks.append(5)
    assert Config().train.profile_ranks == [0]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ModelConfig(num_tables=1, moe=MoEConfig(num_experts=0)), "fuxi-alpha"),
        (ModelConfig(num_tables=1, moe=MoEConfig(num_experts=8)), "fuxi-mme"),
        (ModelConfig(num_tables=4, moe=MoEConfig(num_experts=0)), "fuxi-mme"),
        (ModelConfig(), "fuxi-mme"),
        (ModelConfig(block="sasrec", num_tables=1), "sasrec"),
        (ModelConfig(block="hstu", num_tables=2), "hstu"),
    ],
)
def test_name_of_the_model(model: ModelConfig, name: str) -> None:
    assert model.name == name


@pytest.mark.parametrize(
    ("views", "softmax_views", "softmaxes"), [("together", [4], 1), ("each", [1], 4), ("both", [4, 1], 5)]
)
def test_softmaxes_of_a_token(views: str, softmax_views: list[int], softmaxes: int) -> None:
    loss = LossConfig(views=views)
    assert loss.softmax_views(4) == softmax_views
    assert loss.num_passes == len(softmax_views)
    assert loss.num_softmaxes(4) == softmaxes


@pytest.mark.parametrize(
    ("loss", "groups", "scored"),
    [
        (LossConfig(num_negatives=9), [0, 1, 7], 10),
        (LossConfig(num_negatives=9, negatives="shared", negative_group_size=3), [0, 1, 3], 10),
        (LossConfig(num_negatives=9, negatives="shared", negative_group_size=0), [0, 1, 1], 10),
        (LossConfig(kind="full_softmax"), [0, 1, 7], 50),
    ],
)
def test_negatives_of_a_batch(loss: LossConfig, groups: list[int], scored: int) -> None:
    assert [loss.num_groups(tokens) for tokens in (0, 1, 7)] == groups
    assert loss.num_scored(50) == scored


def test_a_number_of_more_than_64_bits_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{dropout: 1{'0' * 400}}}")
    with pytest.raises(UserError, match=r"config.yaml: model.dropout: expected a number of at most 64 bits$"):
        load_config(tmp_path / "config.yaml", ["data.path=unused"])


@pytest.mark.parametrize("key", ["data.path", "data.cache_dir", "output_dir"])
@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("gs:/bucket/folder", "gs://bucket/folder"),
        ("file:///folder", "file://folder"),
    ],
)
def test_only_a_data_set_may_be_a_url(key: str, path: str, url: str) -> None:
    values = {"data.path": "set", key: path}
    overrides = [f"{name}={value}" for name, value in values.items()]
    if key == "data.path" and not path.startswith("file:"):
        assert load_config(None, overrides).data.path == path
        return
    with pytest.raises(
        UserError, match=f"^{key}: {url}: {path.partition(':')[0]}:// is not supported: expected a path"
    ):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "precision, on_gpu, on_cpu",
    [("auto", "bfloat16", "float32"), ("float32", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16")],
)
def test_automatic_precision_follows_the_device(precision: str, on_gpu: str, on_cpu: str) -> None:
    train = load_config(None, ["data.path=unused", f"train.precision={precision}"]).train
    assert (train.precision_on("cuda"), train.precision_on("cpu")) == (on_gpu, on_cpu)


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        (["model.moe.num_experts=4", "model.moe.top_k=1", "model.moe.renormalize=true"], True),
        (["model.moe.num_experts=4", "model.moe.top_k=1", "model.moe.renormalize=false"], False),
        (["model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.renormalize=true"], False),
        (["model.moe.num_experts=0", "model.moe.top_k=1", "model.moe.renormalize=true"], False),
    ],
)
def test_a_router_without_a_gradient_from_the_task_is_warned_of(overrides: list[str], is_warned: bool) -> None:
    found = warnings(load_config(None, ["data.path=unused", *overrides]))
    assert len(found) == is_warned
    assert all("the router gets no gradient from the task" in warning for warning in found)
