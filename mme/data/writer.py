"""Writes a training set's folder (layout: `mme.data.sequences`), whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.data.sequences import INFO_FILE, ITEMS_FILE
from mme.errors import UserError

EVENTS_PER_PART = 4_000_000


class DatasetWriter:
    """Collects users in a folder beside ``output``, which takes its place when `finish` is called.

    Left without `finish`, or by an exception, it removes what it wrote.

    Raises:
        UserError: ``output`` holds something else than a training set, or can't be written to (no space left, …).
    """

    def __init__(self, output: Path, events_per_part: int = EVENTS_PER_PART) -> None:
        self.output, self.events_per_part = output, events_per_part
        self.partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
        self.parts: list[dict[str, Any]] = []
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def __enter__(self) -> DatasetWriter:
        if self.output.is_dir():
            if any(self.output.iterdir()) and not (self.output / INFO_FILE).is_file():
                raise UserError(f"{self.output}: holds other files: expected a new folder, or an older training set")
        elif self.output.exists():
            raise UserError(f"{self.output}: is a file: expected a folder to write to")
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.output}: can't be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"{self.output}: can't be written: {reason}; nothing was written") from error

    def add(
        self, user_ids: pa.Array, offsets: NDArray[np.int64], items: NDArray[Any], times: NDArray[np.int64]
    ) -> None:
        """Users with their events: those of user u stand at offsets[u] to offsets[u + 1] of ``items`` and ``times``."""
        bounds = pa.array(offsets, pa.int32())
        table = pa.table(
            {
                "user_id": user_ids,
                "item_ids": pa.ListArray.from_arrays(bounds, pa.array(items, pa.int64())),
                "timestamps": pa.ListArray.from_arrays(bounds, pa.array(times, pa.int64())),
            }
        )
        self._waiting.append(table)
        self._num_waiting += len(items)
        if self._num_waiting >= self.events_per_part:
            self._write_part()

    def finish(self, info: dict[str, Any], raw_items: pa.Array, counts: NDArray[np.int64]) -> dict[str, Any]:
        """Writes the item map and dataset.json, puts the folder in its place; returns what dataset.json holds."""
        if self._waiting or not self.parts:
            self._write_part()
        items = pa.table(
            {"item_index": np.arange(len(raw_items)), "item_id": raw_items, "count": pa.array(counts, pa.int64())}
        )
        pq.write_table(items, self.partial / ITEMS_FILE, compression="zstd")
        whole = {
            **info,
            "num_users": sum(part["users"] for part in self.parts),
            "num_items": len(raw_items),
            "num_events": sum(part["events"] for part in self.parts),
            "item_map": ITEMS_FILE,
            "parts": self.parts,
        }
        (self.partial / INFO_FILE).write_text(json.dumps(whole, indent=2) + "\n")
        older = self.partial.with_suffix(".older")
        if self.output.exists():
            os.replace(self.output, older)
        os.replace(self.partial, self.output)
        shutil.rmtree(older, ignore_errors=True)
        return whole

    def _write_part(self) -> None:
        table = pa.concat_tables(self._waiting)
        file = f"part-{len(self.parts):05d}.parquet"
        pq.write_table(table, self.partial / file, compression="zstd")
        self.parts.append({"file": file, "users": table.num_rows, "events": self._num_waiting})
        self._waiting, self._num_waiting = [], 0
