"""Reads and writes test_ranks.parquet, the rank of each test user's target, so that runs can be compared user by user.

One row per user, in the order of the data set:

    user_row         int64         row of the user in the data set
    rank             int64         rank of the target by the model, from 1; null if it is in no list
    popularity_rank  int64         rank of the target by popularity, likewise
    target_place     int64         place of the target in the order of popularity, from 0
    target_events    int64         training events of the target
    history_events   int64         events before the target
    top_items        list<int64>   item indices of the model's list of 10
    novelty          double        novelty of the list in bits, the mean of −log2((c + 1) / (n + I)), where c is the number of
                                   training events of an item and n that of all I items

The key ``mme`` of the file's metadata is a JSON object with model, step, split, protocol, seen, targets_sha256 and num_items.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mme.data.parquet import READ_ERRORS
from mme.errors import UserError, first_line
from mme.evaluation.segments import Floats, Ints
from mme.files import open_to_read, replacing

RANKS_FILE = "test_ranks.parquet"
LIST_LENGTH = 10
UNRANKED = int(np.iinfo(np.int64).max)  # rank of a target that is in no list
_ABOUT = b"mme"
_FACTS = ("user_row", "target_place", "target_events", "history_events")
_REQUIRED = {"model": str, "step": int, "targets_sha256": str, "num_items": int}


@dataclass(frozen=True)
class UserRanks:
    """The content of the file; each attribute is (users,), and `UNRANKED` stands for null.

    Attributes:
        about: the metadata.
        top_items: (users, 10) item indices, padded with −1 if the list is shorter.
    """

    about: dict[str, Any]
    user_row: Ints
    rank: Ints
    popularity_rank: Ints
    target_place: Ints
    target_events: Ints
    history_events: Ints
    top_items: Ints
    novelty: Floats

    def write(self, run: Path) -> Path:
        """Writes the file into a run's folder atomically, with users in the order of the data set."""
        order = np.argsort(self.user_row, kind="stable")
        top = self.top_items[order]
        offsets = np.concatenate([[0], np.cumsum((top >= 0).sum(1))]).astype(np.int32)
        table = pa.table(
            {
                **{name: pa.array(getattr(self, name)[order]) for name in _FACTS},
                **{name: _ranks(getattr(self, name)[order]) for name in ("rank", "popularity_rank")},
                "top_items": pa.ListArray.from_arrays(pa.array(offsets), pa.array(top[top >= 0])),
                "novelty": pa.array(self.novelty[order]),
            }
        ).replace_schema_metadata({_ABOUT: json.dumps(self.about)})
        path = run / RANKS_FILE
        with replacing(path, run) as partial:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
        return path


def read_user_ranks(run: Path) -> UserRanks:
    """Reads the file of a run.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    path = run / RANKS_FILE
    try:
        with open_to_read(path, run) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            table = file.read()
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file: expected the ranks of a finished run (`mme evaluate --run {run} --save-ranks` writes them)"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    about = _read_about(path, table)
    columns = {name: _ints(path, table, name) for name in _FACTS}
    for name in ("rank", "popularity_rank"):
        columns[name] = _ints(path, table, name, UNRANKED)
        if columns[name].size and columns[name].min() < 1:
            raise UserError(f"{path}: column {name!r}: expected ranks from 1, found {columns[name].min()}")
    if not table.num_rows:
        raise UserError(f"{path}: no rows: expected one per user")
    novelty = _column(path, table, "novelty", pa.float64()).to_numpy(zero_copy_only=False)
    top_items = _lists(path, table)
    if top_items.max() >= about["num_items"] or top_items.min() < -1:
        raise UserError(f"{path}: column 'top_items': expected item indices from 0 to {about['num_items'] - 1:,}")
    return UserRanks(about, top_items=top_items, novelty=novelty, **columns)


def _ranks(ranks: Ints) -> pa.Array:
    return pa.array(ranks, mask=ranks == UNRANKED)


def _read_about(path: Path, table: pa.Table) -> dict[str, Any]:
    try:
        about = json.loads((table.schema.metadata or {})[_ABOUT])
        assert all(isinstance(about[name], kind) for name, kind in _REQUIRED.items())
    except (KeyError, ValueError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f"{path}: expected metadata 'mme' with {', '.join(_REQUIRED)}") from error
    return about


def _ints(path: Path, table: pa.Table, name: str, null: int | None = None) -> Ints:
    column = _column(path, table, name, pa.int64())
    if null is not None:
        column = column.fill_null(null)
    if column.null_count:
        raise UserError(f"{path}: column {name!r}: expected a value in every row")
    return column.to_numpy(zero_copy_only=False)


def _column(path: Path, table: pa.Table, name: str, kind: pa.DataType) -> Any:
    if table.column_names.count(name) != 1 or table.schema.field(name).type != kind:
        raise UserError(f"{path}: expected a column {name!r} of {kind}")
    return table[name].combine_chunks()


def _lists(path: Path, table: pa.Table) -> Ints:
    column = _column(path, table, "top_items", pa.list_(pa.int64()))
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    if (lengths > LIST_LENGTH).any():
        raise UserError(f"{path}: column 'top_items': expected at most {LIST_LENGTH} items per row")
    top = np.full((len(column), LIST_LENGTH), -1, np.int64)
    top[np.arange(LIST_LENGTH) < lengths[:, None]] = column.flatten().to_numpy(zero_copy_only=False)
    return top
