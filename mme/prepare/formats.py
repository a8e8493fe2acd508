"""Recognises the format of a file of interactions and its columns of users, items, times and feedback.

| format | file | user, item, time |
|---|---|---|
| parquet, arrow | typed columns | given, or known names |
| csv, json | text, separated by comma, tab, semicolon or bar; JSON lines | given, or known names |
| movielens-1m | ratings.dat, `user::item::rating::seconds`, no header | fixed |
| movielens-20m | ratings.csv of 20M, 25M, 32M and latest | userId, movieId, timestamp |
| kuairand | log_*.csv of Pure, 1K and 27K | user_id, video_id, time_ms |
| kuairec | big_matrix.csv, small_matrix.csv | user_id, video_id, timestamp (with fractions, may be empty) |
| amazon | 2014, 2018: ratings CSV (no header), JSON lines; 2023: CSV (header) and JSON lines, milliseconds | by the ids' form |
| auto | one of these, recognised by its first lines and its header | |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mme.data.layout import FEATURE_PREFIX
from mme.errors import UserError
from mme.prepare.file_start import first_lines, typed_kind, typed_names
from mme.prepare.input_file import InputFile
from mme.prepare.json_reader import json_fields
from mme.prepare.quoting import Quoting
from mme.prepare.readers import ROLES, SourceFile
from mme.prepare.text_reader import Layout, read_header

KNOWN_NAMES = {
    "user": ["user_id", "user", "uid", "customer_id", "reviewer_id", "visitor_id", "account_id", "member_id"],
    "item": ["item_id", "item", "iid", "movie_id", "video_id", "product_id", "parent_asin", "asin", "track_id"],
    "timestamp": ["timestamp", "time", "ts", "unix_time", "unix_review_time", "event_time", "time_ms"],
    "rating": ["rating", "overall", "score", "stars"],
    "click": ["is_click", "click", "clicked"],
    "watch_time": ["watch_time", "watch_time_ms", "play_time", "play_time_ms", "play_duration", "dwell_time"],
    "watch_ratio": ["watch_ratio", "play_ratio"],
    "title": [
        "title",
        "name",
        "item_title",
        "item_name",
        "movie_title",
        "product_title",
        "product_name",
        "video_title",
    ],
}
FIXED_NAMES = {
    "movielens-20m": ["userId", "movieId", "timestamp"],
    "kuairand": ["user_id", "video_id", "time_ms"],
    "kuairec": ["user_id", "video_id", "timestamp"],
}
# The column of FIXED_NAMES that distinguishes a format from others with the same names.
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
FORMATS = ["parquet", "arrow", "csv", "json", "movielens-1m", "movielens-20m", "kuairand", "kuairec", "amazon", "auto"]
MOVIELENS_ROW = re.compile(r"[^:]+::[^:]+::\d(?:\.\d)?::\d+")
AMAZON_USER = re.compile(r"(?:A[0-9A-Z]{8,}|#oc-[0-9A-Z]+)")
AMAZON_ITEM = re.compile(r"(?:B[0-9A-Z]{9}|\d{9}[\dX])")  # ASIN
AMAZON_RATING = re.compile(r"[0-5](?:\.\d+)?")
SECONDS = re.compile(r"\d{8,10}")
TIME_SUFFIXES = ("ms", "us", "ns")  # of a column's name


@dataclass(frozen=True)
class ReadOptions:
    """The user's options for reading files.

    Attributes:
        format: a name of `FORMATS` or `SAME_FORMAT`.
        columns: role → name of the column, or its number from 1.
        header: whether the first line of a text file names the columns; None: recognised by its fields.
        quoting: what `"` means in a text file.
        time_unit: unit of times that are numbers, or `auto` or `iso` (`times.TIME_UNITS`).
        id_type: `auto`, `integer` or `text` (`mme.prepare.ids`).
    """

    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    header: bool | None = None
    quoting: Quoting = "auto"
    time_unit: str = "auto"
    id_type: str = "auto"


def same_format(format: str) -> str:
    """The format for which ``format`` is another name, or ``format`` itself."""
    found = SAME_FORMAT.get(format, format)
    if found not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join([*FORMATS, *SAME_FORMAT])}")
    return found


def open_source(path: InputFile, options: ReadOptions, format: str, more_roles: Iterable[str] = ()) -> SourceFile:
    """How to read ``path``, whose format is ``format`` (see `identify`).

    ``more_roles`` are further roles: feedback, and `FEATURE_PREFIX` with the name of a column.

    Raises:
        UserError: the file has another format, lacks a column for a role, or has two columns of that name.
    """
    roles = [*ROLES, *more_roles]
    kind = typed_kind(path)
    if kind is not None and format in ("csv", "json", "movielens-1m", "amazon"):
        raise UserError(f"{path}: is an Arrow or Parquet file, expected {format}")
    if kind is None and format in ("parquet", "arrow"):
        kind = "parquet" if format == "parquet" else "arrow"
    if kind is not None:
        source = SourceFile(path, _resolve(path, typed_names(path, kind), format, options.columns, roles), kind)
    else:
        source = _of_lines(path, first_lines(path), format, options, roles)
    suffix = source.columns["timestamp"].lower().rpartition("_")[2]
    if source.time_unit is None and suffix in TIME_SUFFIXES and "_" in source.columns["timestamp"]:
        source = replace(source, time_unit=suffix)
    return replace(
        source,
        format=format,
        times_may_be_missing=format == "kuairec",
        text_ids=options.id_type == "text" or (format == "amazon" and options.id_type == "auto"),
    )


def _of_lines(path: InputFile, lines: list[str], format: str, options: ReadOptions, roles: list[str]) -> SourceFile:
    if format == "movielens-1m":
        return _movielens_1m(path, lines, roles)
    if format == "json" or lines[0].lstrip().startswith("{"):
        return _json(path, lines, format, options.columns, roles)
    return _text(path, lines, format, options, roles)


def open_item_table(
    path: InputFile, item_column: str | None, title_column: str | None, more: Mapping[str, str]
) -> SourceFile:
    """How to read a file with one row per item: Parquet, JSON lines or CSV with a header.

    ``more``: role → name of a column. The file needs a title or such a column.

    Raises:
        UserError: a column is missing, given twice, or could be one of several.
    """
    layout = Layout(",", [])
    kind: Literal["parquet", "arrow", "text", "json"]
    typed = typed_kind(path)
    lines = [] if typed else first_lines(path)
    if typed is not None:
        kind, names = typed, typed_names(path, typed)
    elif lines[0].lstrip().startswith("{"):
        kind, names = "json", list(dict.fromkeys(name for line in lines for name in json_fields(line) or {}))
    else:
        separator = _separator(lines[0])
        names, header_lines, blanks_before_quotes = read_header(lines, separator)
        kind, layout = "text", Layout(separator, names, header_lines, blanks_before_quotes)
    columns = {
        "item": _known(path, names, "item", "item-id") if item_column is None else _named(path, names, item_column)
    }
    if title_column is not None or not more or any(_plain(name) in map(_plain, KNOWN_NAMES["title"]) for name in names):
        columns["title"] = _known(path, names, "title") if title_column is None else _named(path, names, title_column)
    columns |= {role: _named(path, names, name) for role, name in more.items()}
    for name in columns.values():
        if names.count(name) > 1:
            raise UserError(f"{path}: {names.count(name)} columns are named {name!r}: expected one")
    if kind == "text" and _is_value(columns["item"]):
        raise UserError(f"{path}: line 1: {lines[0][:60]!r}: no header: expected a line with the names of the columns")
    if kind == "json":
        _require_flat(path, lines, columns.values())
    return SourceFile(path, columns, kind, layout=layout)


def _require_flat(path: InputFile, lines: list[str], names: Iterable[str]) -> None:
    for row in filter(None, map(json_fields, lines)):
        for name in names:
            if isinstance(row.get(name), (list, dict)):
                raise UserError(f"{path}: {name!r} holds a list or an object in JSON, expected text or numbers")


def identify(path: InputFile, format: str) -> str:
    """The format of a file: the plain name of ``format`` or, if that is ``auto``, what its first bytes show."""
    format = same_format(format)
    if format != "auto":
        return format
    typed = typed_kind(path)
    if typed is not None:
        names = set(typed_names(path, typed))
        return "kuairec" if names.issuperset([*FIXED_NAMES["kuairec"], TELLING_NAME["kuairec"]]) else typed
    lines = first_lines(path)
    first = lines[0]
    if first.lstrip().startswith("{"):
        return "amazon" if "asin" in (json_fields(first) or {}) else "json"
    if all(MOVIELENS_ROW.fullmatch(line) for line in lines if line):
        return "movielens-1m"
    names_, _, _ = read_header(lines, _separator(first))
    for name, fixed in FIXED_NAMES.items():
        if set(names_).issuperset([*fixed, TELLING_NAME[name]]):
            return name
    if set(names_).issuperset(["user_id", "parent_asin", "timestamp"]) or _amazon_columns(lines):
        return "amazon"
    return "csv"


def _movielens_1m(path: InputFile, lines: list[str], roles: list[str]) -> SourceFile:
    if not MOVIELENS_ROW.fullmatch(lines[0]):
        raise UserError(f"{path}: line 1: {lines[0][:60]!r}: expected user::item::rating::seconds")
    names = ["user", "1", "item", "3", "rating", "5", "timestamp"]  # "::" makes an empty field between two
    layout = Layout(":", names, header_lines=0)
    return SourceFile(path, _fixed(path, roles, names), "text", layout=layout, quoting="literal")


def _text(path: InputFile, lines: list[str], format: str, options: ReadOptions, roles: list[str]) -> SourceFile:
    separator = _separator(lines[0])
    fields, header_lines, blanks_before_quotes = read_header(lines, separator)
    if len(fields) < len(ROLES):
        raise UserError(
            f"{path}: line 1: {lines[0][:60]!r}: expected at least three columns, separated by comma, tab, semicolon or bar"
        )
    if format == "amazon" and not set(fields) & {"user_id", "parent_asin", "asin"}:
        names = _amazon_columns(lines)
        if names is None:
            raise UserError(
                f"{path}: line 1: {lines[0][:60]!r}: expected user,item,rating,seconds (2014) or item,user,rating,seconds "
                "(2018) of Amazon reviews, with their ids"
            )
        return SourceFile(path, _fixed(path, roles, names), "text", layout=Layout(separator, names, header_lines=0))
    has_header = options.header
    if has_header is None:
        has_header = not any(_is_value(field) for field in fields)
    if not has_header:
        fields, header_lines = [str(number + 1) for number in range(len(fields))], 0
        if not all(options.columns.get(role) for role in ROLES):
            raise UserError(
                f"{path}: line 1: {lines[0][:60]!r}: no header that names the columns; give the numbers of those of "
                "users, items and times, such as --user-column 1 --item-column 2 --timestamp-column 3, or --header if this "
                "line is one"
            )
    columns = _resolve(path, fields, format, options.columns, roles)
    layout = Layout(separator, fields, header_lines, blanks_before_quotes)
    unit = "ms" if format == "amazon" else None
    return SourceFile(path, columns, "text", layout=layout, quoting=options.quoting, time_unit=unit)


def _json(path: InputFile, lines: list[str], format: str, given: dict[str, str], roles: list[str]) -> SourceFile:
    names: dict[str, None] = {}
    for line in lines:
        names.update(dict.fromkeys(json_fields(line) or {}))
    if not names:
        raise UserError(f"{path}: line 1: {lines[0][:60]!r}: expected one JSON object per line, with each key once")
    return SourceFile(path, _resolve(path, list(names), format, given, roles), "json")


def _amazon_columns(lines: list[str]) -> list[str] | None:
    """The columns of Amazon's ratings without a header: user first (2014) or item first (2018), by the form of the ids.

    None if some line has another form.
    """
    rows = [line.split(",") for line in lines if line]
    for names in (["user", "item", "rating", "timestamp"], ["item", "user", "rating", "timestamp"]):
        patterns = [AMAZON_USER if name == "user" else AMAZON_ITEM for name in names[:2]]
        if all(
            len(row) == 4
            and all(
                pattern.fullmatch(text) for pattern, text in zip([*patterns, AMAZON_RATING, SECONDS], row, strict=True)
            )
            for row in rows
        ):
            return names
    return None


def _separator(line: str) -> str:
    return max(",\t;|", key=line.count)


def _is_value(text: str) -> bool:
    """Whether a field of the first line is a number or a date, and so not the name of a column."""
    return re.fullmatch(r"[+-]?\d[\d.]*(?:[eE][+-]?\d+)?|\d{4}-\d{2}-\d{2}.*", text) is not None


def _fixed(path: InputFile, roles: list[str], names: list[str]) -> dict[str, str]:
    """The columns of a file without a header, which are named by their roles."""
    columns = {role: role.removeprefix(FEATURE_PREFIX) for role in roles}
    missing = [name for name in columns.values() if name not in names]
    if missing:
        raise UserError(f"{path}: has no {missing[0].replace('_', ' ')}, only user, item, rating and time")
    return columns


def _resolve(path: InputFile, names: list[str], format: str, given: dict[str, str], roles: list[str]) -> dict[str, str]:
    """The column of each role: as given by the user, fixed by the format, or the first known name in the file."""
    columns = {}
    fixed = dict(zip(ROLES, FIXED_NAMES.get(format, []), strict=False))
    for role in roles:
        wanted = given.get(role) or fixed.get(role)
        if role.startswith(FEATURE_PREFIX):
            wanted = role.removeprefix(FEATURE_PREFIX)
        columns[role] = _known(path, names, role) if wanted is None else _named(path, names, wanted)
        if names.count(columns[role]) > 1:
            raise UserError(f"{path}: {names.count(columns[role])} columns are named {columns[role]!r}: expected one")
    for role, other in (("user", "item"), ("user", "timestamp"), ("item", "timestamp")):
        if columns[role] == columns[other]:
            raise UserError(f"{path}: column {columns[role]!r} is given as {role} and as {other}: expected two columns")
    return columns


def _named(path: InputFile, names: list[str], wanted: str) -> str:
    """The column with this name or, if there is none, with this number, from 1."""
    if wanted in names:
        return wanted
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return names[int(wanted) - 1]
    raise UserError(f"{path}: no column {wanted!r} (found: {_listed(names)})")


def _known(path: InputFile, names: list[str], role: str, option: str | None = None) -> str:
    option = option or role.replace("_", "-")
    for known in KNOWN_NAMES[role]:
        found = list(dict.fromkeys(name for name in names if _plain(name) == _plain(known)))
        if len(found) > 1:
            raise UserError(
                f"{path}: columns {' and '.join(map(repr, found))} could both be the {role}'s: name one by --{option}-column"
            )
        if found:
            return found[0]
    raise UserError(
        f"{path}: no column {KNOWN_NAMES[role][0]!r} (found: {_listed(names)}); name it by --{option}-column"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
