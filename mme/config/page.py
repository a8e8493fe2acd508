"""Generates the tables of docs/configuration.md from the schema.

    python -m mme.config.page docs/configuration.md

replaces each table that follows a line ``<!-- keys of SECTION -->``, where SECTION is a section of the configuration such as
``model.moe``, or ``top level``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from omegaconf import MISSING

from mme.config.key import DESCRIPTION, RANGE
from mme.config.schema import Config

TOP_LEVEL = "top level"
TABLE = re.compile(r"(<!-- keys of (?P<section>[\w. ]+) -->\n\n)(?:\|.*\n)*")


def sections(schema: Any = Config, name: str = "") -> dict[str, Any]:
    """The dataclasses of the sections by name."""
    found = {name or TOP_LEVEL: schema}
    for key, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            found |= sections(hint, f"{name}.{key}".lstrip("."))
    return found


def table(section: str) -> str:
    """The keys of a section as a Markdown table.

    Raises:
        KeyError: there is no such section.
    """
    schema = sections()[section]
    prefix = "" if section == TOP_LEVEL else f"{section}."
    hints = get_type_hints(schema)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(schema):
        if not dataclasses.is_dataclass(hints[field.name]):
            cells = _type(hints[field.name], field), _default(field), field.metadata[DESCRIPTION]
            lines.append(f"| `{prefix}{field.name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """The page with every table generated from the schema.

    Raises:
        ValueError: a section is missing on the page or occurs more than once.
    """
    placed = sorted(match["section"] for match in TABLE.finditer(page))
    if placed != sorted(sections()):
        raise ValueError(f"the page has the sections {placed}, expected {sorted(sections())}, each once")
    return TABLE.sub(lambda match: match[1] + table(match["section"]), page)


def _type(hint: Any, field: dataclasses.Field[Any]) -> str:
    allowed = field.metadata[RANGE].notation() if RANGE in field.metadata else ""
    if get_origin(hint) is Literal:
        *first, last = get_args(hint)
        return f"{', '.join(first)} or {last}"
    if get_origin(hint) is Union:
        return " ".join([get_args(hint)[0].__name__, allowed, "or null"]).replace("  ", " ")
    if get_origin(hint) is list:
        return f"list of {get_args(hint)[0].__name__}"
    return f"{hint.__name__} {allowed}".rstrip()


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if default == MISSING:
        return "required"
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def main(page: Path) -> None:
    """Replaces the tables of a page by those generated from the schema."""
    page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    typer.run(main)
