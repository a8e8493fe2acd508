"""JSON files of figures with one row per line, which are small in git and readable in a diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WIDTH = 320


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` and makes the folder if needed. A value that fits into `WIDTH` characters takes one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(value) + "\n")


def to_json(value: Any, indent: int = 0, before: int = 0) -> str:
    """``value`` as JSON; ``before`` is the number of characters before it on its line."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + before + len(line) < WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        keys = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value]
        lines = [name + to_json(value[key], indent + 1, len(name)) for name, key in zip(keys, value, strict=True)]
        opening, closing = "{", "}"
    else:
        lines = [to_json(element, indent + 1) for element in value]
        opening, closing = "[", "]"
    return opening + "\n" + ",\n".join(inner + line for line in lines) + "\n" + " " * indent + closing
