"""The meaning of the rows of a model's tables: item ids, feature values and user ids, in the order of their indices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mme.config import USER_ID
from mme.data.features import Vocabulary, read_vocabularies
from mme.data.layout import ITEMS_FILE
from mme.data.parquet import Kind, read_table
from mme.data.parts import read_user_ids
from mme.errors import UserError

TEXTS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Numbering:
    """Raw ids and values by index.

    Attributes:
        item_ids: raw ids by item index.
        vocabularies: values of each feature column that the model reads, except `user_id`.
        user_ids: raw ids by user row if the model reads `user_id`, otherwise None.
    """

    item_ids: pa.Array
    vocabularies: dict[str, Vocabulary]
    user_ids: pa.Array | None

    @classmethod
    def read(cls, folder: Path, info: dict[str, Any], features: Iterable[str]) -> Numbering:
        """The numbering of the items and of the columns ``features`` of the data set in ``folder``.

        Raises:
            UserError: a file is missing or damaged.
        """
        names = list(features)
        users = None
        if USER_ID in names:
            users = pa.concat_arrays([ids for part in info["parts"] for ids in read_user_ids(folder, part)])
        return cls(read_item_ids(folder), read_vocabularies(folder, [n for n in names if n != USER_ID]), users)

    def feature_sizes(self) -> dict[str, int]:
        """The number of table rows of each column: its values, and one row for missing and unknown values."""
        sizes = {name: len(vocabulary.numbers) + 1 for name, vocabulary in self.vocabularies.items()}
        return sizes if self.user_ids is None else {**sizes, USER_ID: len(self.user_ids) + 1}


def read_item_ids(folder: Path) -> pa.Array:
    """Raw item ids by item index.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _read_items(folder, "item_id", "integer or text")


def read_item_counts(folder: Path) -> NDArray[np.int64]:
    """The number of events of each item in the data set, by item index.

    Raises:
        UserError: the file is missing or damaged.
    """
    return np.asarray(_read_items(folder, "count", "integer")).astype(np.int64)


def _read_items(folder: Path, column: str, kind: Kind) -> pa.Array:
    table = read_table(folder, ITEMS_FILE, {"item_index": "integer", column: kind}).sort_by("item_index")
    if not np.array_equal(table["item_index"], np.arange(table.num_rows)):
        raise UserError(f"{folder / ITEMS_FILE}: item_index: expected each number from 0 to {table.num_rows - 1} once")
    return table[column].combine_chunks()


def numbering_sha256(folder: Path, info: dict[str, Any], features: Iterable[str]) -> str:
    """SHA-256 of the raw item ids and of the values of each of ``features`` (for `user_id`, the user ids), in order.

    A model fits a data set if this hash is that of its training data; events may have been added since.
    """
    digest = hashlib.sha256()
    for array in _numbered(folder, info, list(features)):
        for start in range(0, len(array), TEXTS_AT_ONCE):
            texts = array.slice(start, TEXTS_AT_ONCE).to_pylist()
            digest.update("".join(f"{text}\n" for text in texts).encode())
    return digest.hexdigest()


def _numbered(folder: Path, info: dict[str, Any], features: list[str]) -> Iterator[pa.Array]:
    yield read_item_ids(folder)
    for name, vocabulary in read_vocabularies(folder, [name for name in features if name != USER_ID]).items():
        yield pa.array([name])
        yield pa.array(vocabulary.numbers, pa.string())
    if USER_ID in features:
        for part in info["parts"]:
            yield from read_user_ids(folder, part)
