"""docs/configuration.md has the tables of the schema, and the shipped configurations are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from mme.config import Config, load_config
from mme.config.key import keys_of
from mme.config.page import with_tables

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "configuration.md"


def test_page_has_the_tables_of_the_schema() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run: python -m mme.config.page docs/configuration.md"
    for name, _, _ in keys_of(Config()):
        assert page.count(f"\n| `{name}` |") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [("", r"has the sections \[\]"), ("<!-- keys of data -->\n\n" * 2, r"\['data', 'data'\], expected \['data', ")],
)
def test_a_page_without_or_with_two_places_for_a_section_is_refused(changed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_tables(changed)


def test_tables_show_type_range_and_default() -> None:
    page = PAGE.read_text()
    for row in [
        "| `data.path` | str | required | ",
        "| `model.dropout` | float ≥ 0, < 1 | 0.2 | ",
        "| `train.steps` | int > 0 or null | null | ",
        "| `train.profile_ranks` | list of int | [0] | ",
        "| `train.resume` | bool | true | ",
        "| `kernels.backend` | auto, torch or triton | auto | ",
        "| `output_dir` | str | runs/default | ",
    ]:
        assert f"\n{row}" in page


def test_every_description_fits_into_a_table() -> None:
    for name, field, _ in keys_of(Config()):
        description = field.metadata["description"]
        assert description.endswith(".") and "|" not in description, name


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_is_valid_and_described(path: Path) -> None:
    assert load_config(path, ["data.path=anywhere"]).data.path == "anywhere"
    assert path.read_text().startswith("# ")
