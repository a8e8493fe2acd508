"""Which files of interactions a path means, what each is, and which of its columns are user, item, time and feedback.

| format | file | user, item, time |
|---|---|---|
| parquet, csv, json | typed columns; text with a header, separated by comma, tab, semicolon or bar; JSON lines | given, or known names |
| movielens-1m | ratings.dat, `user::item::rating::seconds`, no header | fixed |
| movielens-20m | ratings.csv of 20M, 25M, 32M and latest | userId, movieId, timestamp |
| kuairand | log_*.csv of Pure, 1K and 27K | user_id, video_id, time_ms |
| kuairec | big_matrix.csv, small_matrix.csv | user_id, video_id, timestamp (with fractions, may be empty) |
| amazon | 2014, 2018: ratings CSV (no header), JSON lines; 2023: CSV (header) and JSON lines, milliseconds | see `_amazon` |
| auto | one of these, told by its first bytes and its header | |
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mme.data.layout import FEATURE_PREFIX
from mme.errors import UserError, first_line
from mme.prepare.readers import SourceFile, json_fields

ROLES = ("user", "item", "timestamp")
KNOWN_NAMES = {
    "user": ["user_id", "user", "uid", "customer_id", "reviewer_id", "visitor_id", "account_id", "member_id"],
    "item": ["item_id", "item", "iid", "movie_id", "video_id", "product_id", "parent_asin", "asin", "track_id"],
    "timestamp": ["timestamp", "time", "ts", "unix_time", "unix_review_time", "event_time", "time_ms"],
    "rating": ["rating", "overall", "score", "stars"],
    "click": ["is_click", "click", "clicked"],
    "watch_time": ["watch_time", "watch_time_ms", "play_time", "play_time_ms", "play_duration", "dwell_time"],
    "watch_ratio": ["watch_ratio", "play_ratio"],
}
FIXED_NAMES = {
    "movielens-20m": ["userId", "movieId", "timestamp"],
    "kuairand": ["user_id", "video_id", "time_ms"],
    "kuairec": ["user_id", "video_id", "timestamp"],
}
# Of FIXED_NAMES, the column that tells a format from others with the same names.
TELLING_NAME = {"movielens-20m": "movieId", "kuairand": "time_ms", "kuairec": "watch_ratio"}
SAME_FORMAT = {
    "movielens-10m": "movielens-1m",
    "movielens-25m": "movielens-20m",
    "movielens-32m": "movielens-20m",
    "movielens-latest": "movielens-20m",
    "kuairand-pure": "kuairand",
    "kuairand-1k": "kuairand",
    "kuairand-27k": "kuairand",
    "amazon-2014": "amazon",
    "amazon-2018": "amazon",
    "amazon-2023": "amazon",
}
FORMATS = ["parquet", "csv", "json", "movielens-1m", "movielens-20m", "kuairand", "kuairec", "amazon", "auto"]
# The files of a published folder that are the log; KuaiRand's random log and KuaiRec's small matrix are asked for by name.
FILES_IN_FOLDER = {
    "movielens-1m": ["ratings.dat"],
    "movielens-20m": ["ratings.csv"],
    "kuairand": ["log_standard_*.csv"],
    "kuairec": ["big_matrix.csv"],
    "parquet": ["*.parquet", "*.pq"],
    "json": ["*.json", "*.jsonl", "*.ndjson"],
    "csv": ["*.csv", "*.tsv", "*.txt"],
}
COMPRESSED = ["", ".gz", ".bz2", ".zst", ".lz4"]


def same_format(format: str) -> str:
    """The format that ``format`` is another name of, or itself."""
    found = SAME_FORMAT.get(format, format)
    if found not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join([*FORMATS, *SAME_FORMAT])}")
    return found


def find_files(inputs: Sequence[str | Path], format: str) -> list[Path]:
    """The files that paths, folders and patterns such as ``logs/2024-*.parquet`` mean, each group in order of names.

    Of a folder, at any depth, those that the format's publisher calls the log, or all files of its kind; hidden files
    and those beginning with an underscore are none.

    Raises:
        UserError: nothing is there.
    """
    format = same_format(format)
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += _files_in(path, format)
        elif not path.exists() and glob.has_magic(str(path)):
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))
            if not found:
                raise UserError(f"{path}: no file matches")
            files += found
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _files_in(folder: Path, format: str) -> list[Path]:
    groups = [FILES_IN_FOLDER["json"] + FILES_IN_FOLDER["csv"]] if format == "amazon" else [FILES_IN_FOLDER.get(format)]
    if format == "auto":
        groups = list(FILES_IN_FOLDER.values())
    for patterns in groups:
        wanted = [pattern + ending for pattern in patterns or [] for ending in COMPRESSED]
        found = sorted({path for pattern in wanted for path in folder.rglob(pattern) if _is_visible(path, folder)})
        if found:
            return found
    names = ", ".join(pattern for patterns in groups for pattern in patterns or [])
    raise UserError(f"{folder}: no file of interactions in this folder, expected {names}")


def _is_visible(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)


def identify(path: Path, format: str) -> str:
    """The format of a file: ``format`` by its plain name, or what its first bytes tell where that is ``auto``.

    Raises:
        UserError: no such file, or an empty one.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder: expected a file of interactions")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file: expected interactions")
    format = same_format(format)
    return _detect(_first_lines(path), path) if format == "auto" else format


def open_source(path: Path, format: str, given: dict[str, str], more_roles: Iterable[str] = ()) -> SourceFile:
    """How to read ``path``, whose format is ``format``, not ``auto``.

    ``given`` holds the names of columns that the user gave, by role; ``more_roles`` the further roles that are wanted:
    feedback, and `FEATURE_PREFIX` with the name of a column.

    Raises:
        UserError: the file is of another format, or has no column for a role.
    """
    first_lines = _first_lines(path)
    roles = [*ROLES, *more_roles]
    if first_lines is None and format in ("csv", "json", "movielens-1m", "amazon"):
        raise UserError(f"{path}: is a Parquet file, expected {format}")
    if format == "parquet" or first_lines is None:
        source = SourceFile(path, _resolve(path, _parquet_names(path), format, given, roles), "parquet")
    elif format == "movielens-1m":
        source = _movielens_1m(path, first_lines, roles)
    elif format == "json" or first_lines[0].lstrip().startswith("{"):
        source = _json(path, first_lines, format, given, roles)
    else:
        source = _text(path, first_lines, format, given, roles)
    if source.time_unit is None and source.columns["timestamp"].lower().endswith("_ms"):
        source = replace(source, time_unit=1000)
    return replace(source, loose_times=format == "kuairec", text_ids=format == "amazon")


def _movielens_1m(path: Path, first_lines: list[str], roles: list[str]) -> SourceFile:
    if first_lines[0].count("::") != 3:
        raise UserError(f"{path}: line 1: {first_lines[0][:60]!r}: expected user::item::rating::seconds")
    header = ["user", "1", "item", "3", "rating", "5", "timestamp"]  # "::" leaves an empty field between two
    return SourceFile(path, _fixed(path, roles, header), "text", separator=":", header=header)


def _text(path: Path, first_lines: list[str], format: str, given: dict[str, str], roles: list[str]) -> SourceFile:
    separator = max(",\t;|", key=first_lines[0].count)
    fields = [text.strip().strip('"').lstrip("\ufeff") for text in first_lines[0].split(separator)]
    if format == "amazon" and "user_id" not in fields:
        header = _amazon_header(path, separator, fields, first_lines)
        return SourceFile(path, _fixed(path, roles, header), "text", separator=separator, header=header)
    columns = _resolve(path, fields, format, given, roles)
    return SourceFile(path, columns, "text", 1000 if format == "amazon" else None, separator)


def _json(path: Path, first_lines: list[str], format: str, given: dict[str, str], roles: list[str]) -> SourceFile:
    # A line may be longer than what was read of the file; its end is then no JSON.
    names: dict[str, None] = {}
    for line in first_lines:
        names.update(dict.fromkeys(json_fields(line) or {}))
    if not names:
        raise UserError(f"{path}: line 1: {first_lines[0][:60]!r}: expected one JSON object a line")
    return SourceFile(path, _resolve(path, list(names), format, given, roles), "json")


def _amazon_header(path: Path, separator: str, fields: list[str], first_lines: list[str]) -> list[str]:
    """Ratings of 2014 are user, item, rating, seconds; those of 2018 item, user, rating, seconds.

    They are told apart by the items' ids (ASIN), which all have ten characters.
    """
    if len(fields) != 4:
        raise UserError(f"{path}: line 1: {first_lines[0][:60]!r}: expected user,item,rating,seconds of Amazon reviews")
    whole_lines = first_lines[:-1] or first_lines
    item_first = all(len(line.split(separator)[0]) == 10 for line in whole_lines if line)
    return ["item", "user", "rating", "timestamp"] if item_first else ["user", "item", "rating", "timestamp"]


def _first_lines(path: Path) -> list[str] | None:
    """The first lines of a text file (compressed too); None: it is Parquet."""
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PAR1":
                return None
        with pa.input_stream(str(path)) as stream:
            lines = stream.read(1 << 18).decode("utf-8", errors="replace").splitlines()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read: {first_line(error)}") from error
    if not lines:
        raise UserError(f"{path}: empty file: expected interactions")
    if "\0" in lines[0]:
        raise UserError(f"{path}: neither Parquet nor text")
    return lines


def _detect(first_lines: list[str] | None, path: Path) -> str:
    if first_lines is None:
        names = set(_parquet_names(path))
        return "kuairec" if names.issuperset([*FIXED_NAMES["kuairec"], TELLING_NAME["kuairec"]]) else "parquet"
    first = first_lines[0]
    if first.lstrip().startswith("{"):
        return "amazon" if "asin" in (json_fields(first) or {}) else "json"
    if first.count("::") == 3:
        return "movielens-1m"
    fields = {text.strip().strip('"').lstrip("\ufeff") for text in first.split(",")}
    for format, fixed in FIXED_NAMES.items():
        if fields.issuperset([*fixed, TELLING_NAME[format]]):
            return format
    if fields.issuperset(["user_id", "parent_asin", "timestamp"]):
        return "amazon"
    if first.count(",") == 3 and first.rpartition(",")[2].strip().isdigit():
        return "amazon"  # values in place of a header
    return "csv"


def _parquet_names(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file, perhaps truncated ({first_line(error)})") from error


def _fixed(path: Path, roles: list[str], header: list[str]) -> dict[str, str]:
    """Columns of a file without a header, named by their roles."""
    columns = {role: role.removeprefix(FEATURE_PREFIX) for role in roles}
    missing = [name for name in columns.values() if name not in header]
    if missing:
        raise UserError(f"{path}: has no {missing[0].replace('_', ' ')}, only user, item, rating and time")
    return columns


def _resolve(path: Path, names: list[str], format: str, given: dict[str, str], roles: list[str]) -> dict[str, str]:
    """The column of each role: as given, as the format says, or the first known name that is there."""
    columns = {}
    fixed = dict(zip(ROLES, FIXED_NAMES.get(format, []), strict=False))
    for role in roles:
        wanted = given.get(role) or fixed.get(role)
        if role.startswith(FEATURE_PREFIX):
            wanted = role.removeprefix(FEATURE_PREFIX)
        if wanted is not None:
            if wanted not in names:
                raise UserError(f"{path}: no column {wanted!r} (found: {', '.join(names)})")
            columns[role] = wanted
            continue
        plain = {_plain(name): name for name in reversed(names)}
        found = next((plain[_plain(known)] for known in KNOWN_NAMES[role] if _plain(known) in plain), None)
        if found is None:
            option = role.replace("_", "-")
            raise UserError(
                f"{path}: no column {KNOWN_NAMES[role][0]!r} (found: {', '.join(names)}); name it by --{option}-column"
            )
        columns[role] = found
    return columns


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
