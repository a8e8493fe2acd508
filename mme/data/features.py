"""Feature columns of events, such as an action or a rating, with their values as indices.

Each column has a vocabulary that numbers its values from 1 in order of appearance; 0 stands for a missing or unknown value.
Existing indices stay when events are added, and new values get the next ones. The kind of a column determines what counts as
one value:

    category    texts; numbers and booleans are converted to their text, 4.0 to 4
    number      finite numbers, or texts of numbers, in logarithmic buckets, see `Numbers`

    features.parquet    one row per value: column, value_index (from 1, without a gap), value, kind of the column

To add a kind, write a subclass of `Vocabulary` and add it to `KINDS`. Everything after this module handles only indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.config import USER_ID, ModelConfig
from mme.data.layout import FEATURE_PREFIX, FEATURES_FILE
from mme.data.parquet import Kind, read_table
from mme.errors import UserError, first_line

MOST_VALUES = 1_000_000  # per column, because they are kept in memory and each has a row in the model's tables
BUCKETS_PER_OCTAVE = 4
SMALLEST = 4300  # more than 4 · 1074, so that the code of the smallest number is positive
TRAILING_ZEROS = r"^([+-]?\d+)\.0+$"


@dataclass(frozen=True)
class Features:
    """The feature columns of events and of users that batches carry; the column `user_id` is the user itself."""

    events: Sequence[str] = ()
    users: Sequence[str] = ()

    @classmethod
    def of(cls, model: ModelConfig) -> Features:
        return cls(model.event_features, model.user_features)


NO_FEATURES = Features()


class Vocabulary:
    """The values of one column and their indices; this class is the kind "category"."""

    kind = "category"

    def __init__(self, values: Iterable[str] = ()) -> None:
        self.numbers = {value: number for number, value in enumerate(values, 1)}

    def texts(self, column: pa.Array) -> pa.Array:
        """The values as texts, null if missing; raises TypeError if the column does not have this kind."""
        return category_texts(column)

    def learn(self, column: pa.Array) -> NDArray[np.int32]:
        """The index of each value; new values get the next indices.

        Raises:
            TypeError: the column does not have this kind.
            OverflowError: the column has more than `MOST_VALUES` values.
        """
        encoded = self.texts(column).dictionary_encode()
        numbers = [self.numbers.setdefault(value, len(self.numbers) + 1) for value in encoded.dictionary.to_pylist()]
        if len(self.numbers) > MOST_VALUES:
            raise OverflowError(f"has more than {MOST_VALUES:,} different values, too many for a category")
        return _take(numbers, encoded)

    def find(self, column: pa.Array) -> NDArray[np.int32]:
        """The index of each value, 0 if it is missing or unknown; raises TypeError like `learn`."""
        encoded = self.texts(column).dictionary_encode()
        return _take([self.index_of(value) for value in encoded.dictionary.to_pylist()], encoded)

    def index_of(self, value: str) -> int:
        """The index of a value, 0 if it is unknown."""
        return self.numbers.get(value, 0)


class Numbers(Vocabulary):
    """Finite numbers in buckets of relative width 2^(1/4); a value in features.parquet is the code of its bucket.

    The code of v is sign(v) · (4300 + ⌊4 · log2 |v|⌋), and 0 for v = 0, so that codes have the order of the numbers. A number
    in an unknown bucket gets the index of the nearest known one.
    """

    kind = "number"

    def __init__(self, values: Iterable[str] = ()) -> None:
        """Raises ValueError if a value is not a code."""
        super().__init__(values)
        list(map(int, self.numbers))

    def texts(self, column: pa.Array) -> pa.Array:
        return bucket_codes(column).cast(pa.string())

    def index_of(self, value: str) -> int:
        nearest = min(self.numbers, key=lambda known: abs(int(known) - int(value)), default="")
        return self.numbers.get(nearest, 0)


KINDS = {vocabulary.kind: vocabulary for vocabulary in (Vocabulary, Numbers)}


def split_kind(column: str) -> tuple[str, str]:
    """``price:number`` → (price, number); a name without a kind is a category."""
    name, _, kind = column.rpartition(":")
    return (name, kind) if name and kind in KINDS else (column, Vocabulary.kind)


def bucket_codes(column: pa.Array) -> pa.Array:
    """The bucket's code of each number, int64, null if missing; see `Numbers`.

    Raises:
        TypeError: the column does not hold numbers.
    """
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        trimmed = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise TypeError(f"holds {column.type}, expected numbers")
    try:
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise TypeError(f"holds a value that is not a number ({first_line(error)})") from error
    known = np.isfinite(numbers)
    magnitude = np.abs(np.where(known & (numbers != 0), numbers, 1.0))
    codes = np.sign(np.where(known, numbers, 0.0)) * (SMALLEST + np.floor(BUCKETS_PER_OCTAVE * np.log2(magnitude)))
    return pa.array(codes.astype(np.int64), mask=~known)


def category_texts(column: pa.Array) -> pa.Array:
    """The values as texts, null if missing; raises TypeError for a column that cannot hold categories."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    elif not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        raise TypeError(f"holds {kind}, expected texts, numbers or booleans")
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    text = pc.replace_substring_regex(text, TRAILING_ZEROS, r"\1")
    return pc.if_else(pc.equal(text, ""), None, text)


def _take(numbers: list[int], encoded: pa.DictionaryArray) -> NDArray[np.int32]:
    # The last entry is the index of missing values.
    places = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([*numbers, 0], np.int32)[places]


def write_vocabularies(folder: Path, vocabularies: dict[str, Vocabulary]) -> None:
    """Writes features.parquet, unless there are no columns."""
    if not vocabularies:
        return
    tables = [
        pa.table(
            {
                "column": pa.array([name] * len(vocabulary.numbers), pa.string()),
                "value_index": pa.array(list(vocabulary.numbers.values()), pa.int64()),
                "value": pa.array(list(vocabulary.numbers), pa.string()),
                "kind": pa.array([vocabulary.kind] * len(vocabulary.numbers), pa.string()),
            }
        )
        for name, vocabulary in vocabularies.items()
    ]
    pq.write_table(pa.concat_tables(tables), folder / FEATURES_FILE, compression="zstd")


def read_vocabularies(folder: Path, names: Iterable[str]) -> dict[str, Vocabulary]:
    """The vocabularies of the named columns.

    Raises:
        UserError: the file is missing or damaged.
    """
    names = list(names)
    if not names:
        return {}
    columns: dict[str, Kind] = {"column": "text", "value_index": "integer", "value": "text"}
    table = read_table(folder, FEATURES_FILE, columns, optional={"kind": "text"}).sort_by("value_index")
    try:
        return {name: _vocabulary(table.filter(pc.equal(table["column"], name))) for name in names}
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / FEATURES_FILE}: damaged: {first_line(error)}; run `mme prepare` again") from error


def _vocabulary(rows: pa.Table) -> Vocabulary:
    """The vocabulary of one column; sets of older versions have no kinds."""
    kind = rows["kind"][0].as_py() if "kind" in rows.column_names and rows.num_rows else Vocabulary.kind
    return KINDS[kind](rows["value"].to_pylist())


def feature_sizes(folder: Path, info: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    """The number of indices of each column, including 0 for missing values; `user_id` has one per user and 0.

    Args:
        info: the content of dataset.json of the set in ``folder``.

    Raises:
        UserError: the set has no such column.
    """
    found: dict[str, int] = info.get("features", {})
    sizes = {name: number + 1 for name, number in found.items()} | {USER_ID: info["num_users"] + 1}
    for name in names:
        if name not in sizes:
            has = f"its columns are {', '.join(found)}" if found else "it has no feature columns"
            raise UserError(
                f"{folder}: no column {name!r}, which model.event_features or model.user_features names: {has}; "
                "--feature-columns of `mme prepare` keeps them"
            )
    return {name: sizes[name] for name in names}


def parts_column(name: str) -> str:
    """The name of a feature column in the parts, the event file and the loaders."""
    return FEATURE_PREFIX + name
