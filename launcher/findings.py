"""The result of a check, as a line that one process writes and another reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

MARK = "finding: "


@dataclass(frozen=True)
class Finding:
    """One check: ``found`` is what it saw, ``advice`` what to do after a warning or failure."""

    check: str
    status: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""

    def print_line(self) -> None:
        print(MARK + json.dumps(asdict(self)), flush=True)


def read_lines(output: str) -> list[Finding]:
    """The findings in the output of a process, which may print other lines too."""
    return [Finding(**json.loads(line.removeprefix(MARK))) for line in output.splitlines() if line.startswith(MARK)]
