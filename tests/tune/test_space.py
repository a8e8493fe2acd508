"""Valid search spaces are read, and invalid ones are rejected with a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from mme.errors import UserError
from mme.tune.space import Choice, Interval, override, read_space

CONFIG = Path("configs/quickstart.yaml")  # the shipped configuration, from any folder


def read(tmp_path: Path, text: str) -> list[Choice | Interval]:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return read_space(path, CONFIG, [])


def test_bounds_and_lists(tmp_path: Path) -> None:
    text = "train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\nmodel.num_blocks: {low: 1, high: 4}\nmodel.moe.placement: [[0], [0, 1]]\n"
    rate, blocks, placement = read(tmp_path, text)
    assert rate == Interval("train.lr", 1e-4, 1e-2, None, True) and not rate.is_integer
    assert blocks == Interval("model.num_blocks", 1, 4) and blocks.is_integer
    assert placement == Choice("model.moe.placement", ([0], [0, 1]))
    assert override("model.moe.placement", [0, 1]) == "model.moe.placement=[0, 1]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.drop: [0.1]", r"model\.drop: no such key"),
        ("model: [1]", r"model: is a section, expected one key such as model\."),
        ("model.dropout: [much]", r"model\.dropout: \"much\": .*could not be converted to Float"),
        ("model.dropout: 0.3", r"expected a list of values, or low and high"),
        ("model.dropout: []", r"expected a list of values, or low and high"),
        ("model.dropout: {low: 0.1}", r"expected a list of values, or low and high"),
        ("model.dropout: {low: 0.5, high: 0.1}", r"low \(0\.5\) is above high \(0\.1\)"),
        ("train.lr: {low: 0.0, high: 0.1, log: true}", r"log needs low above 0"),
        ("train.lr: {low: null, high: 0.1}", r"low, high and step must be numbers"),
        ("train.lr: {low: 1e-4, high: 1e-2}", r"must be numbers \(YAML reads 1e-3 as text"),
        ("model.num_blocks: {low: 1, high: 4, step: 0}", r"step \(0\) must be above 0"),
        ("output_dir: [a, b]", r"each trial has its own folder"),
        ("- 1", r"expected keys of the configuration"),
        ("a: [", r"cannot be read as YAML"),
    ],
)
def test_invalid_spaces_give_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and str(tmp_path / "space.yaml") in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        read_space(tmp_path / "nothing.yaml", CONFIG, [])
