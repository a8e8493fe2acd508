"""The meaning of the rows of a model's tables: item ids, feature values and user ids, in the order of their indices."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mme.config import USER_ID
from mme.data.features import Vocabulary, read_vocabularies
from mme.data.id_lookup import IdLookup
from mme.data.layout import ITEMS_FILE, TITLE
from mme.data.parquet import Kind, open_parquet, read_table
from mme.data.parts import read_user_ids
from mme.errors import UserError
from mme.files import HASH_THREADS

TEXTS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Extent:
    """The part of a data set's numbering that a model knows: the first items, and the first values of each feature.

    Attributes:
        num_items: number of items.
        feature_sizes: for each feature column, its number of values plus one, see `mme.data.features.feature_sizes`.
    """

    num_items: int
    feature_sizes: Mapping[str, int]

    def num_values(self, name: str | None) -> int:
        """Values of a feature column; None: items."""
        return self.num_items if name is None else self.feature_sizes[name] - 1


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

    def first(self, extent: Extent) -> Numbering:
        """The part of the numbering that a model knows of a set that has grown since."""
        return Numbering(
            self.item_ids.slice(0, extent.num_items),
            {
                name: type(vocabulary)(itertools.islice(vocabulary.numbers, extent.num_values(name)))
                for name, vocabulary in self.vocabularies.items()
            },
            None if self.user_ids is None else self.user_ids.slice(0, extent.num_values(USER_ID)),
        )

    @cached_property
    def items(self) -> IdLookup:
        """Finds item indices."""
        return IdLookup(self.item_ids)

    @cached_property
    def users(self) -> IdLookup:
        """Finds user rows; only if the model reads `user_id`."""
        assert self.user_ids is not None
        return IdLookup(self.user_ids)

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


def read_titles(folder: Path) -> pa.Array | None:
    """Titles by item index, text or null; None if the data set has no titles.

    Raises:
        UserError: the file is missing or damaged, or its titles are not text.
    """
    with open_parquet(folder, ITEMS_FILE) as file:
        if TITLE not in file.schema_arrow.names:
            return None
        table = file.read(columns=["item_index", TITLE]).sort_by("item_index")
    titles = table[TITLE].combine_chunks()
    if not pa.types.is_string(titles.type):
        raise UserError(f"{folder / ITEMS_FILE}: column {TITLE!r} holds {titles.type}, expected text")
    titles.validate(full=True)
    return titles


def read_item_labels(folder: Path) -> pa.Array:
    """What a person reads for each item, by item index: its title or, if it has none, its raw id.

    Raises:
        UserError: see `read_titles`.
    """
    ids, titles = read_item_ids(folder).cast(pa.string()), read_titles(folder)
    return ids if titles is None else pc.coalesce(titles, ids)


def _read_items(folder: Path, column: str, kind: Kind) -> pa.Array:
    table = read_table(folder, ITEMS_FILE, {"item_index": "integer", column: kind}).sort_by("item_index")
    if not np.array_equal(table["item_index"], np.arange(table.num_rows)):
        raise UserError(f"{folder / ITEMS_FILE}: item_index: expected each number from 0 to {table.num_rows - 1} once")
    return table[column].combine_chunks()


def numbering_sha256(folder: Path, info: dict[str, Any], features: Iterable[str], extent: Extent | None = None) -> str:
    """SHA-256 of the raw item ids and of the values of each of ``features`` (for `user_id`, the user ids), in order.

    A model fits a data set if this hash is that of its training data; events may have been added since.

    Args:
        extent: the first items and values, which are hashed; None: all. If the set has fewer, the result is "".
    """
    digest = hashlib.sha256()
    for name, arrays in _numbered(folder, info, list(features)):
        if name not in (None, USER_ID):
            digest.update(f"{name}\n".encode())
        left = sum(map(len, arrays)) if extent is None else extent.num_values(name)
        for array in arrays:
            array = array.slice(0, left)
            left -= len(array)
            for lines in _in_order(array):
                digest.update(lines)
        if left:
            return ""
    return digest.hexdigest()


def _in_order(array: pa.Array) -> Iterator[memoryview]:
    """`_lines` of the array, chunk by chunk; threads prepare the next chunks."""
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        for start in range(0, len(array), HASH_THREADS * TEXTS_AT_ONCE):
            chunks = [array.slice(start + n * TEXTS_AT_ONCE, TEXTS_AT_ONCE) for n in range(HASH_THREADS)]
            yield from threads.map(_lines, chunks)


def _lines(values: pa.Array) -> memoryview:
    """The values as UTF-8 texts, each followed by a line feed."""
    nothing, line_feed = pa.scalar("", pa.large_string()), pa.scalar("\n", pa.large_string())
    lines = pc.binary_join_element_wise(values.cast(pa.large_string()), nothing, line_feed)
    _, offsets, data = lines.buffers()
    return memoryview(data)[: np.frombuffer(offsets, np.int64)[len(lines)]]


def _numbered(folder: Path, info: dict[str, Any], features: list[str]) -> Iterator[tuple[str | None, list[pa.Array]]]:
    """The items under None, then the values of each feature under its name, then the users under `user_id`."""
    yield None, [read_item_ids(folder)]
    for name, vocabulary in read_vocabularies(folder, [name for name in features if name != USER_ID]).items():
        yield name, [pa.array(vocabulary.numbers, pa.string())]
    if USER_ID in features:
        yield USER_ID, [ids for part in info["parts"] for ids in read_user_ids(folder, part)]
