"""Runs the code cells of a notebook in order, in the working folder, as a notebook's kernel would.

python scripts/run_notebook.py docs/first-model.ipynb
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: Path) -> dict[str, Any]:
    """The names that the cells define."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    return names


if __name__ == "__main__":
    names = run(Path(sys.argv[1]))
    print(names["results"].to_string(index=False))
    print(names["lists"].to_string(index=False))
