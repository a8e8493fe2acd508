"""The results of the suite, one JSON object per line, written as soon as they are known so that they survive any interruption.

{"run": 1, "dry": false, "seconds": 470.0}                              the start of a run of the suite
{"run": 1, "stage": "rates", "figure": "copy", "gb_per_s": 2900.0}      a figure
{"run": 1, "stage": "rates", "figure": "copy", "failed": "…"}           a figure that could not be measured
{"run": 1, "stage": "rates", "status": "done", "s": 12.3}               the end of a stage: done, failed or out of time
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.jsonl"
DEVICE_LOST = 75  # exit status of a stage if an error has destroyed the GPU's context; it can continue in a new process


class Results:
    """``results.jsonl`` in a folder. Reading skips truncated lines."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS_FILE

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def append(self, *lines: dict[str, Any]) -> None:
        """Writes the lines and waits until they are on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            cut_off = file.tell() > 0 and _last_byte(self.path) != b"\n"
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.write((("\n" if cut_off else "") + text).encode())
            file.flush()
            os.fsync(file.fileno())

    def runs(self) -> int:
        return max((line["run"] for line in self.lines()), default=0)

    def done(self) -> set[str]:
        """The stages that succeeded in any run."""
        return {line["stage"] for line in self.lines() if line.get("status") == "done"}


class Recorder:
    """Records the figures of one stage in one run.

    A figure from an earlier run is not measured again. A figure that failed is measured again, but not in the same run.
    """

    def __init__(self, folder: Path, run: int, stage: str) -> None:
        self.results, self.run, self.stage = Results(folder), run, stage
        own = [line for line in self.results.lines() if line.get("stage") == stage and "figure" in line]
        self.known = {line["figure"] for line in own if "failed" not in line or line["run"] == run}
        self.failures = sum("failed" in line and line["run"] == run for line in own)

    def figure(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        self.rows(name, lambda: [measure()])

    def rows(self, name: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        """Records several figures of one measurement, one per line. A failure is recorded and does not stop the stage."""
        if name in self.known:
            return
        began, head = time.perf_counter(), {"run": self.run, "stage": self.stage, "figure": name}
        try:
            rows = measure()
        except Exception as error:  # after any error the other figures can still be measured
            traceback.print_exc()
            self.failures += 1
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.results.append(head | {"failed": f"{type(error).__name__}: {text}"})
            if is_device_lost(error):
                raise SystemExit(DEVICE_LOST) from error
            return
        took = {"took_s": round(time.perf_counter() - began, 2)}
        self.results.append(*(head | _rounded(row) | took for row in rows))

    def recorded(self, stage: str, figure: str) -> dict[str, Any]:
        """The newest result of a figure of another stage; empty if it failed."""
        found = [line for line in self.results.lines() if (line.get("stage"), line.get("figure")) == (stage, figure)]
        return next((line for line in reversed(found) if "failed" not in line), {})


def is_device_lost(error: Exception) -> bool:
    """Whether CUDA no longer works in this process."""
    return "CUDA error" in str(error)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(element) for key, element in value.items()}
    return [_rounded(element) for element in value] if isinstance(value, list) else value


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()
