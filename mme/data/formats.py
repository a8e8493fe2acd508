"""Files of interactions → batches of raw columns: one row an event, user, item and time as they stand in the file.

| format | file | user, item, time |
|---|---|---|
| parquet, csv | typed columns; text with a header, separated by comma, tab, semicolon or bar | given, or known names |
| movielens-1m | ratings.dat, `user::item::rating::seconds`, no header | fixed |
| movielens-20m | ratings.csv of 20M, 25M, 32M and latest | userId, movieId, timestamp |
| kuairand | log_*.csv | user_id, video_id, time_ms |
| amazon | ratings CSV of 2014 and 2018 (no header) and of 2023 (header, milliseconds) | see `_amazon` |
| auto | one of these, told by its first bytes and its header | |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mme.errors import UserError

ROLES = ("user", "item", "timestamp")
KNOWN_NAMES = {
    "user": ["user_id", "user", "uid", "customer_id", "reviewer_id", "visitor_id", "account_id", "member_id"],
    "item": ["item_id", "item", "iid", "movie_id", "video_id", "product_id", "parent_asin", "asin", "track_id"],
    "timestamp": ["timestamp", "time", "ts", "unix_time", "unix_review_time", "event_time", "time_ms"],
}
FIXED_NAMES = {
    "movielens-20m": ["userId", "movieId", "timestamp"],
    "kuairand": ["user_id", "video_id", "time_ms"],
}
SAME_FORMAT = {"movielens-25m": "movielens-20m", "movielens-32m": "movielens-20m", "movielens-latest": "movielens-20m"}
FORMATS = ["parquet", "csv", "movielens-1m", "movielens-20m", "kuairand", "amazon", "auto"]

NULL_TEXTS = ["", "NULL", "null", "NaN", "nan", "None", "none", "NA", "N/A", "\\N"]
CSV_BLOCK_BYTES = 8 << 20
PARQUET_ROWS = 1 << 18


@dataclass
class SourceFile:
    """One file and how to read it.

    Attributes:
        columns: role (user, item, timestamp) → name of the column.
        milliseconds: whether times are in milliseconds.
        separator: of text; None: Parquet.
        header: the names of all columns in order, for text without a header line; None: it has one.
        text_ids: ids are text even where they look like numbers.
        broken_lines: numbers of the lines that do not have as many fields as columns, as they are met.
        rows_read: rows of the batches before the present one.
    """

    path: Path
    columns: dict[str, str]
    milliseconds: bool
    separator: str | None = None
    header: list[str] | None = None
    text_ids: bool = False
    broken_lines: list[int] = field(default_factory=list)
    rows_read: int = 0

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Record batches with the columns user, item and timestamp, in the order of the file; text columns as text."""
        names = [self.columns[role] for role in ROLES]
        try:
            if self.separator is None:
                with pq.ParquetFile(self.path) as file:
                    yield from self._pick(file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names))))
            else:
                with self._open_text(names) as reader:
                    yield from self._pick(reader)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: can't be read to its end: {_first_line(error)}") from error

    def _pick(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_arrays([batch.column(self.columns[role]) for role in ROLES], list(ROLES))
            self.rows_read += batch.num_rows

    def place(self, row: int) -> str:
        """Where row number ``row`` (from 0, broken lines not counted) stands, for a message."""
        if self.separator is None:
            return f"row {row}"
        line = row + (1 if self.header else 2)
        for broken in self.broken_lines:  # in rising order
            if broken <= line:
                line += 1
        return f"line {line}"

    def _open_text(self, names: list[str]) -> pyarrow.csv.CSVStreamingReader:
        def skip(row: pyarrow.csv.InvalidRow) -> str:
            self.broken_lines.append(row.number)
            return "skip"

        return pyarrow.csv.open_csv(
            pa.input_stream(str(self.path)),
            # One thread: the numbers of broken lines are known only then.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES, column_names=self.header),
            pyarrow.csv.ParseOptions(delimiter=self.separator, invalid_row_handler=skip),
            pyarrow.csv.ConvertOptions(
                include_columns=list(dict.fromkeys(names)),
                column_types={name: pa.string() for name in names},
                null_values=NULL_TEXTS,
                strings_can_be_null=True,
            ),
        )


def open_source(path: Path, format: str, given: dict[str, str | None]) -> SourceFile:
    """How to read ``path``; ``given`` holds the names of columns that the user gave, by role.

    Raises:
        UserError: no such file, an empty one, another format, or no column for a role.
    """
    format = SAME_FORMAT.get(format, format)
    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join([*FORMATS, *SAME_FORMAT])}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder: expected a file of interactions")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file: expected interactions")
    first_lines = _first_lines(path)
    if format == "auto":
        format = _detect(first_lines)
    is_parquet = first_lines is None
    if is_parquet and format in ("csv", "movielens-1m", "amazon"):
        raise UserError(f"{path}: is a Parquet file, expected {format}")
    if format == "parquet" or is_parquet:
        names = _parquet_names(path)
        columns = _resolve(path, names, format, given)
        return SourceFile(path, columns, _is_milliseconds(columns))
    assert first_lines is not None
    if format == "movielens-1m":
        if first_lines[0].count("::") != 3:
            raise UserError(f"{path}: line 1: {first_lines[0][:60]!r}: expected user::item::rating::seconds")
        header = ["user", "1", "item", "3", "rating", "5", "timestamp"]  # "::" leaves an empty field between two
        return SourceFile(path, {role: role for role in ROLES}, False, ":", header)
    separator = max(",\t;|", key=first_lines[0].count)
    fields = [text.strip().strip('"').lstrip("\ufeff") for text in first_lines[0].split(separator)]
    if format == "amazon":
        return _amazon(path, separator, fields, first_lines, given)
    columns = _resolve(path, fields, format, given)
    return SourceFile(path, columns, _is_milliseconds(columns), separator)


def _first_lines(path: Path) -> list[str] | None:
    """The first lines of a text file (compressed too); None: it is Parquet."""
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                return None
        with pa.input_stream(str(path)) as stream:
            lines = stream.read(1 << 16).decode("utf-8", errors="replace").splitlines()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read: {_first_line(error)}") from error
    if not lines:
        raise UserError(f"{path}: empty file: expected interactions")
    if "\0" in lines[0]:
        raise UserError(f"{path}: neither Parquet nor text")
    return lines


def _detect(first_lines: list[str] | None) -> str:
    if first_lines is None:
        return "parquet"
    first = first_lines[0]
    fields = {text.strip().strip('"') for text in first.split(",")}
    if first.count("::") == 3:
        return "movielens-1m"
    for format, names in FIXED_NAMES.items():
        if fields.issuperset(names):
            return format
    if first.count(",") == 3 and first.rpartition(",")[2].strip().isdigit():
        return "amazon"  # values in place of a header
    return "csv"


def _parquet_names(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file, perhaps truncated ({_first_line(error)})") from error


def _resolve(path: Path, names: list[str], format: str, given: dict[str, str | None]) -> dict[str, str]:
    """The column of each role: as given, as the format says, or the first known name that is there."""
    columns = {}
    for place, role in enumerate(ROLES):
        wanted = given.get(role) or (FIXED_NAMES[format][place] if format in FIXED_NAMES else None)
        if wanted is not None:
            if wanted not in names:
                raise UserError(f"{path}: no column {wanted!r} (found: {', '.join(names)})")
            columns[role] = wanted
            continue
        plain = {_plain(name): name for name in reversed(names)}
        found = next((plain[_plain(known)] for known in KNOWN_NAMES[role] if _plain(known) in plain), None)
        if found is None:
            raise UserError(
                f"{path}: no column {KNOWN_NAMES[role][0]!r} (found: {', '.join(names)}); name it by --{role}-column"
            )
        columns[role] = found
    return columns


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")


def _is_milliseconds(columns: dict[str, str]) -> bool:
    return columns["timestamp"].lower().endswith("_ms")


def _amazon(
    path: Path, separator: str, fields: list[str], first_lines: list[str], given: dict[str, str | None]
) -> SourceFile:
    """2023: a header and milliseconds. 2014: user, item, rating, seconds; 2018: item, user, rating, seconds.

    The two older ones are told apart by the items' ids (ASIN), which all have ten characters.
    """
    if "user_id" in fields:
        columns = _resolve(path, fields, "amazon", given)
        return SourceFile(path, columns, milliseconds=True, separator=separator, text_ids=True)
    if len(fields) != 4:
        raise UserError(f"{path}: line 1: {first_lines[0][:60]!r}: expected user,item,rating,seconds of Amazon reviews")
    whole_lines = first_lines[:-1] or first_lines
    item_first = all(len(line.split(separator)[0]) == 10 for line in whole_lines if line)
    header = ["item", "user", "rating", "timestamp"] if item_first else ["user", "item", "rating", "timestamp"]
    return SourceFile(path, {role: role for role in ROLES}, False, separator, header, text_ids=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
