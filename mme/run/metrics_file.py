"""metrics.jsonl: one JSON object a line, in the order of the steps.

{"kind": "run",     "step": 0, "world_size": 2, "device": …, "parameters": {part: count}, "versions": {…}, …}
{"kind": "train",   "step": 10, "epoch": 0, "loss": 6.91…, "tokens_per_s": …, "lr": …, "step_ms": …, …}
            on several processes "wait_ms", "straggler_ms" and "slowest_rank" too (`mme.distributed.pace`)
{"kind": "experts", "step": 10, "blocks": [0, 1], "load": [block][view][expert], sums of 1 over the experts, …}
{"kind": "eval",    "step": 100, "model": "fuxi-mme", "split": "valid", "protocol": …, "ndcg@10": …, …}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mme.errors import UserError
from mme.files import open_to_read, read_text, replacing

METRICS_FILE = "metrics.jsonl"
MAX_BYTES = 1 << 30
FIGURES = {"step", "epoch", "loss", "tokens_per_s", "lr", "step_ms", "wait_ms", "straggler_ms", "mrr", "users"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off while it was written is left out.

    Raises:
        UserError: no such file, a line that is not a JSON object with a kind, or a figure that is no number.
    """
    try:
        text = read_text(path, path.parent, MAX_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: expected the metrics of a run (made by `mme train`)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text (byte {error.start}): expected one JSON object a line") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected the metrics of a run") from error
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            flaw = _flaw(record)
            if flaw:
                raise UserError(f"{path}: line {number}: {flaw}")
            records.append(record)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path}: line {number}: expected a JSON object with a kind, found {line[:60]!r}")
    return records


def keep_lines_until(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl, whole or not at all, with the lines up to ``step``; empty for step 0."""
    kept = []
    if step and path.exists():
        with open_to_read(path, path.parent) as file:
            for line in file.read().decode(errors="replace").split("\n"):
                record = _parse(line)
                if record is not None and _is_number(at := record.get("step", 0)) and at <= step:
                    kept.append(line + "\n")
    with replacing(path, path.parent) as partial, partial.open("w") as file:
        file.writelines(kept)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Adds the file's name to what the system says of a failed write, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _parse(line: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and "kind" in record:
            return record
    return None


def _flaw(record: dict[str, Any]) -> str | None:
    """What is wrong with a figure that readers of metrics.jsonl count on."""
    for name, value in record.items():
        if (name in FIGURES or "@" in name) and value is not None and not _is_number(value):
            return f"{name}: expected a number, found {value!r}"
    if record["kind"] != "run" and not _is_number(record.get("step")):
        return f"step: expected a number, found {record.get('step')!r}"
    load = record.get("load")
    if record["kind"] == "experts" and not (
        isinstance(load, list)
        and isinstance(record.get("blocks"), list)
        and len(record["blocks"]) == len(load) > 0
        and all(isinstance(views, list) for views in load)
        and all(isinstance(shares, list) and all(map(_is_number, shares)) for views in load for shares in views)
    ):
        return f"load: expected lists of shares by block and view, and the blocks beside it, found {str(load)[:60]}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
