"""Reads and writes metrics.jsonl, one JSON object per line in the order of the steps. `mme.run.records` describes the objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mme.errors import UserError
from mme.files import open_to_read, read_text, replacing
from mme.run.records import flaw

METRICS_FILE = "metrics.jsonl"
MAX_BYTES = 1 << 30


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A truncated last line is left out, because a job may still be writing it.

    Raises:
        UserError: the file is missing, a line is not a JSON object with a kind, or a field does not fit its kind.
    """
    try:
        text = read_text(path, path.parent, MAX_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: expected the metrics of a run (made by `mme train`)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text (byte {error.start}): expected one JSON object per line") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected the metrics of a run") from error
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            if found := flaw(record):
                raise UserError(f"{path}: line {number}: {found}")
            records.append(record)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path}: line {number}: expected a JSON object with a kind, found {line[:60]!r}")
    return records


def keep_lines_until(path: Path, step: int) -> None:
    """Drops the lines after ``step`` from metrics.jsonl, all at once; step 0 empties it."""
    kept = []
    if step and path.exists():
        with open_to_read(path, path.parent) as file:
            for line in file.read().decode(errors="replace").split("\n"):
                record = _parse(line)
                if record is not None and not flaw(record) and record.get("step", 0) <= step:
                    kept.append(line + "\n")
    with replacing(path, path.parent) as partial, partial.open("w") as file:
        file.writelines(kept)


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Adds the file's name to the system's message when a write fails, for example on a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _parse(line: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):  # not JSON, or a number of thousands of digits; deeply nested lists
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            return record
    return None
