"""Writes the folder of a training set (layout: `mme.data.parts`) atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.data.description import file_sum
from mme.data.layout import FEATURES_FILE, FORMAT_VERSION, FRACTIONS, INFO_FILE, ITEMS_FILE, LEFT_OUT_FILE, OWN_FILES
from mme.errors import UserError, first_line
from mme.files import open_to_read
from mme.prepare.replacement import FolderReplacement
from mme.prepare.statistics import LengthHistogram, popularity_summary

EVENTS_PER_PART = 4_000_000
EVENTS_PER_ROW_GROUP = 500_000


class DatasetWriter:
    """Collects users in a folder next to ``output``, which replaces it when `finish` is called.

    If the context ends without `finish`, it removes what it wrote; if the process is killed, the next writer does. ``kept``: see
    `FolderReplacement`.

    Raises:
        UserError: ``output`` has something other than a training set, is being written by another process, or can't
            be written to (no space left, …).
    """

    def __init__(self, output: Path, events_per_part: int = EVENTS_PER_PART, *, kept: Path | None = None) -> None:
        self.output, self.events_per_part = output, events_per_part
        self.replacement = FolderReplacement(output, kept)
        self.parts: list[dict[str, Any]] = []
        self._lengths = LengthHistogram()
        self._waiting: list[pa.Table] = []
        self._events_waiting = 0
        self._part: pq.ParquetWriter | None = None

    @property
    def partial(self) -> Path:
        """The folder that replaces ``output`` at the end."""
        return self.replacement.partial

    def __enter__(self) -> DatasetWriter:
        if self.output.is_dir():
            names = sorted(path.name for path in self.output.iterdir())
            others = [name for name in names if not any(fnmatch(name, own) for own in OWN_FILES)]
            if others or (names and INFO_FILE not in names):
                found = (others or names)[0]
                raise UserError(
                    f"{self.output}: holds other files ({found}): expected a new folder, or one with only an older training set"
                )
        elif self.output.exists():
            raise UserError(f"{self.output}: is a file: expected a folder to write to")
        self.replacement.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.replacement.__exit__(kind, error, traceback)
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            raise UserError(f"{self.output}: can't be written: {reason}; nothing was written") from error

    def add(
        self,
        user_ids: pa.Array,
        offsets: NDArray[np.int64],
        items: NDArray[Any],
        times: NDArray[np.int64],
        columns: Mapping[str, NDArray[np.int32]] | None = None,
    ) -> None:
        """Adds users. The events of user u are offsets[u] to offsets[u + 1] of ``items``, ``times`` and each of the further
        ``columns``, which have the same names in every call."""
        bounds = pa.array(offsets, pa.int32())
        table = pa.table(
            {
                "user_id": user_ids,
                "item_ids": pa.ListArray.from_arrays(bounds, pa.array(items, pa.int64())),
                "timestamps": pa.ListArray.from_arrays(bounds, pa.array(times, pa.int64())),
                **{
                    name: pa.ListArray.from_arrays(bounds, pa.array(values, pa.int32()))
                    for name, values in (columns or {}).items()
                },
            }
        )
        self._lengths.add(np.diff(offsets))
        self._waiting.append(table)
        self._events_waiting += len(items)
        if self._events_waiting >= min(EVENTS_PER_ROW_GROUP, self.events_per_part):
            self._write_row_group()

    def link(self, path: Path, part: dict[str, Any]) -> None:
        """Adds a part of another set, unchanged, as the next part; it is linked instead of copied if the file system can."""
        self._end_part()
        file = self._next_file()
        with open_to_read(path, path.parent) as source:  # a regular file, and no link
            try:
                os.link(path, self.partial / file, follow_symlinks=False)
            except OSError:
                with (self.partial / file).open("xb") as copy:
                    shutil.copyfileobj(source, copy)
        column = pq.read_table(self.partial / file, columns=["timestamps"])["timestamps"]
        self._lengths.add(np.asarray(pc.list_value_length(column), np.int64))
        sums: dict[str, Any] = {} if "sha256" in part else dict(file_sum(self.partial / file))
        self.parts.append({**part, **sums, "file": file})

    def finish(
        self,
        info: dict[str, Any],
        raw_items: pa.Array,
        counts: NDArray[np.int64],
        item_columns: Mapping[str, pa.Array] | None = None,
    ) -> dict[str, Any]:
        """Writes the item map and dataset.json, puts the folder in its place and returns the content of dataset.json.

        ``item_columns`` are titles and attributes, in the order of ``raw_items``.
        """
        self._end_part()
        items = pa.table(
            {
                "item_index": np.arange(len(raw_items)),
                "item_id": raw_items,
                "count": pa.array(counts, pa.int64()),
                **(item_columns or {}),
            }
        )
        pq.write_table(items, self.partial / ITEMS_FILE, compression="zstd")
        whole = {
            "format_version": FORMAT_VERSION,
            **info,
            "num_users": sum(part["users"] for part in self.parts),
            "num_items": len(raw_items),
            "num_events": sum(part["events"] for part in self.parts),
            "statistics": {
                "events_per_user": self._lengths.summary(),
                "events_per_item": popularity_summary(counts),
            },
            "item_map": ITEMS_FILE,
            "parts": self.parts,
            "files": {
                name: file_sum(self.partial / name)
                for name in (ITEMS_FILE, FEATURES_FILE, LEFT_OUT_FILE)
                if (self.partial / name).exists()
            },
        }
        (self.partial / INFO_FILE).write_text(json.dumps(whole, indent=2) + "\n")
        self.replacement.commit()
        return whole

    def _next_file(self) -> str:
        return f"part-{len(self.parts):05d}.parquet"

    def _write_row_group(self) -> None:
        table = pa.concat_tables(self._waiting)
        if self._part is None:
            file = self._next_file()
            self.parts.append({"file": file, "users": 0, "events": 0})
            # Nearly all times are different, so a dictionary of them would be built and discarded.
            few_values = [
                f"{name}.list.element"
                for name in table.column_names
                if name not in ("user_id", "timestamps", FRACTIONS)
            ]
            self._part = pq.ParquetWriter(
                self.partial / file, table.schema, compression="zstd", use_dictionary=few_values
            )
        self._part.write_table(table)
        self.parts[-1]["users"] += table.num_rows
        self.parts[-1]["events"] += self._events_waiting
        self._waiting, self._events_waiting = [], 0
        if self.parts[-1]["events"] >= self.events_per_part:
            self._end_part()

    def _end_part(self) -> None:
        if self._waiting:
            self._write_row_group()
        if self._part is not None:
            self._part.close()
            self._part = None
            self.parts[-1].update(file_sum(self.partial / self.parts[-1]["file"]))
