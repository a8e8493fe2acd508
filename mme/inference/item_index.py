"""A faiss index of the item vectors, which searches a large catalogue without scoring every item.

Legend: B histories, I items of the catalogue, D total embedding width, k items of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mme.data.parts import IntArray
from mme.errors import UserError, first_line
from mme.files import open_to_read

FloatArray = NDArray[np.float32]
MOST_EXCLUDED = 0.1  # of the catalogue; a graph search finds too few items if it has to pass over more
VECTORS_AT_ONCE = 65_536
TOLERANCE = 1e-5  # between the vectors that two devices compute from the same weights


class ItemIndex:
    """The index in ``path``, written by `mme export --what index`.

    Args:
        item_ids: raw ids by item index.
        vectors: (I, D) float32, the item vectors of the model.

    Raises:
        UserError: faiss or a file is missing, or the index is damaged or belongs to another model.
    """

    def __init__(self, path: Path, item_ids: pa.Array, vectors: FloatArray) -> None:
        faiss = import_faiss()
        try:
            for file in (path, items_file(path)):
                with open_to_read(file):  # rejects anything but a regular file
                    pass
            self._index = faiss.read_index(str(path))
            ids = pq.read_table(items_file(path))["item_id"].combine_chunks()
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file") from error
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or first_line(error)}") from error
        except (RuntimeError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path}: not a faiss index with its items, or damaged ({first_line(error)})") from error
        if not ids.equals(item_ids) or not _contains(self._index, vectors):
            raise UserError(f"{path}: the index of another model: expected an export of this one")

    def can_exclude(self, items: int) -> bool:
        """Whether the search remains accurate with this number of excluded items."""
        return items <= MOST_EXCLUDED * self._index.ntotal

    def search(self, states: FloatArray, excluded: Sequence[IntArray], k: int) -> tuple[IntArray, FloatArray]:
        """The best items that the index finds for each history, and their scores, largest first: both (B, k).

        Args:
            states: (B, D) float32.
            excluded: item indices that each history's list must not contain.

        Returns:
            −1 in the places for which the index finds no item.
        """
        items, scores = np.empty((len(states), k), np.int64), np.empty((len(states), k), np.float32)
        for row, without in enumerate(excluded):
            found = self._index.search(states[row : row + 1], k, params=self._parameters(without))
            scores[row], items[row] = found[0][0], found[1][0]
        return items, scores

    def _parameters(self, excluded: IntArray) -> Any:
        faiss = import_faiss()
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded)) if excluded.size else None
        if hasattr(self._index, "hnsw"):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self._index.hnsw.efSearch)
        return faiss.SearchParameters(sel=selector)


def import_faiss() -> Any:
    """The module faiss; raises UserError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("an index needs faiss, which is not installed: `pip install 'mme[serve]'`") from error
    return faiss


def items_file(index: Path) -> Path:
    """The Parquet file with the raw id of each row of an index."""
    return index.with_name(f"{index.name}.items.parquet")


def _contains(index: Any, vectors: FloatArray) -> bool:
    """Whether the index contains these vectors."""
    if (index.ntotal, index.d) != vectors.shape:
        return False
    starts = range(0, len(vectors), VECTORS_AT_ONCE)
    parts = [vectors[start : start + VECTORS_AT_ONCE] for start in starts]
    return all(
        np.abs(index.reconstruct_n(start, len(part)) - part).max() <= TOLERANCE
        for start, part in zip(starts, parts, strict=True)
    )
