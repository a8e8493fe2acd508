"""docs/configuration.md names every key of the schema with its type and default, and no other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from omegaconf import MISSING

from mme.config import Config, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "configuration.md"
ROW = re.compile(r"^\| `(?P<key>[\w.]+)` \| (?P<type>[^|]+) \| (?P<default>[^|]+) \| (?P<meaning>[^|]+) \|$")


def test_page_and_schema_agree() -> None:
    rows = [match for line in PAGE.read_text().splitlines() if (match := ROW.match(line))]
    on_page = {row["key"]: (row["type"].strip(), row["default"].strip()) for row in rows}
    assert len(on_page) == len(rows), "a key stands on the page twice"
    assert on_page == dict(keys_of(Config))
    assert all(row["meaning"].strip().endswith(".") for row in rows)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_is_valid_and_says_what_it_is(path: Path) -> None:
    assert load_config(path, ["data.path=anywhere"]).data.path == "anywhere"
    assert path.read_text().startswith("# ")


def keys_of(schema: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys_of(hint, f"{name}.")
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        yield name, (type_name(hint), default_text(default))


def type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        *first, last = get_args(hint)
        return f"{', '.join(first)} or {last}"
    if get_origin(hint) is Union:
        return f"{get_args(hint)[0].__name__} or null"
    if get_origin(hint) is list:
        return f"list of {get_args(hint)[0].__name__}"
    return hint.__name__


def default_text(default: Any) -> str:
    if default == MISSING:
        return "required"
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)
