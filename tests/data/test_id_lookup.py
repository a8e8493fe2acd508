"""Raw ids of every type become the indices that a scan of all known ids finds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mme.data.id_lookup import IdLookup


@pytest.mark.parametrize(
    ("known", "given"),
    [
        (pa.array([30, 10, -5, 2**62]), pa.array([10, 11, None, 2**62, -5, 31, -6, 30, 0])),
        (pa.array([2**64 - 1, 3], pa.uint64()), pa.array([3, 2**64 - 1, 0, None], pa.uint64())),
        (pa.array([2**64 - 1, 3], pa.uint64()), pa.array([3, 4])),
        (pa.array(["b", "", "ä"]), pa.array(["ä", "a", None, "", "b"])),
        (pa.array([], pa.int64()), pa.array([1, None])),
    ],
    ids=["integers", "unsigned", "integers of another type", "texts", "none"],
)
def test_indices_equal_those_of_arrow(known: pa.Array, given: pa.Array) -> None:
    expected = pc.index_in(given.cast(known.type), known, skip_nulls=True).fill_null(-1)
    found = IdLookup(known).find(given)
    assert found.dtype == np.int64 and found.tolist() == expected.to_pylist()


@pytest.mark.parametrize(
    ("known", "given"),
    [
        (pa.array([1, 2]), pa.array(["x"])),
        (pa.array([1, 2]), pa.array([2**63], pa.uint64())),
        (pa.array(["a"]), pa.array([[1]])),
    ],
    ids=["text", "large", "lists"],
)
def test_ids_of_another_type_are_refused(known: pa.Array, given: pa.Array) -> None:
    with pytest.raises(pa.ArrowException):
        IdLookup(known).find(given)
