"""The Parquet files of a training set, opened through `mme.files`: no link is followed, only regular files are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mme.data.layout import INFO_FILE
from mme.errors import UserError, first_line
from mme.files import open_to_read

# What reading a damaged file raises; UnicodeDecodeError, if a column's name is not UTF-8.
READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
Kind = Literal["integer", "text", "integer or text"]


@contextmanager
def open_parquet(folder: Path, name: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file of the set in ``folder``.

    Raises:
        UserError: the file is missing, not regular, reached through a link or damaged; also if reading within the context
            fails.
    """
    path = folder / name
    try:
        with open_to_read(path, folder) as source, pq.ParquetFile(source) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, though {INFO_FILE} names it") from error
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: not a readable Parquet file, perhaps truncated ({reason})") from error


def read_table(
    folder: Path, name: str, columns: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> pa.Table:
    """Reads columns of a file of the set and checks that every value is valid and none is null.

    Args:
        optional: columns that are read if the file has them.

    Raises:
        UserError: see `open_parquet`; or a column is missing, duplicated or of another kind, or has a null.
    """
    path = folder / name
    with open_parquet(folder, name) as file:
        found = file.schema_arrow.names
        wanted = {**columns, **{column: kind for column, kind in (optional or {}).items() if column in found}}
        for column, kind in wanted.items():
            if found.count(column) != 1:
                raise UserError(f"{path}: columns {', '.join(map(repr, found))}: expected one named {column!r}")
            held = file.schema_arrow.field(column).type
            if not _is_of_kind(held, kind):
                raise UserError(f"{path}: column {column!r} holds {held}, expected {kind}")
        table = file.read(columns=list(wanted))
        table.validate(full=True)
    if column := next((column for column in wanted if table[column].null_count), ""):
        raise UserError(f"{path}: column {column!r} has a null, expected a value in every row")
    return table


def _is_of_kind(held: pa.DataType, kind: Kind) -> bool:
    is_text = pa.types.is_string(held) or pa.types.is_large_string(held)
    return (kind != "text" and pa.types.is_integer(held)) or (kind != "integer" and is_text)
