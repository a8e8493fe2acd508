"""The file of `--items`: one row per item with its title and attributes, joined to the items of a training set.

items.csv: movieId,title,genres      → items.parquet: item_index, item_id, count, title, attribute_genres
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mme.data.layout import ATTRIBUTE_PREFIX
from mme.errors import UserError
from mme.prepare.formats import open_item_table
from mme.prepare.ids import IdColumn, as_bits, convert_ids, from_bits, settle_kind
from mme.prepare.inputs import find_files
from mme.prepare.manifest import file_record
from mme.prepare.readers import SourceFile
from mme.prepare.values import REPLACEMENT, is_missing, plain, trimmed

FIRST_UNKNOWN = 3


@dataclass(frozen=True)
class ItemOptions:
    """The user's options for the file of items.

    Attributes:
        path: a file, local or in a remote store.
        item_column, title_column: names of the columns, or numbers from 1; None: the first known name.
        attributes: names of further columns to keep.
    """

    path: str
    item_column: str | None = None
    title_column: str | None = None
    attributes: Sequence[str] = ()


@dataclass(frozen=True)
class ItemTable:
    """What the file says.

    Attributes:
        ids: (rows,) raw ids, each once: text, int64 or, if one is above 2^63 - 1, uint64.
        columns: name in items.parquet → (rows,) text, null if missing.
    """

    source: SourceFile
    ids: pa.Array
    columns: dict[str, pa.Array] = field(repr=False)

    @classmethod
    def read(cls, options: ItemOptions, ids: IdColumn) -> ItemTable:
        """Reads the file, whose ids must be of the kind of ``ids``, the set's item ids.

        Raises:
            UserError: there is not exactly one file, a column is missing, a row has no id, an invalid one or one of an
                earlier row, or a wrong number of fields.
        """
        paths = find_files([options.path], "auto")
        if len(paths) != 1:
            raise UserError(f"--items {options.path}: stands for {len(paths)} files, expected one")
        columns = {ATTRIBUTE_PREFIX + name: name for name in options.attributes}
        source = open_item_table(paths[0], options.item_column, options.title_column, columns)
        own = IdColumn(ids.kind, said=ids.said)
        found: list[pa.Array] = []
        texts: dict[str, list[pa.Array]] = {name: [] for name in source.columns if name != "item"}
        for batch in source.batches():
            if not found:
                settled = replace(own, fixed=own.kind is not None)
                settle_kind(source, "item", batch.column("item"), settled)
                own.kind = settled.kind
            numbers, faults = convert_ids(source, "item", batch.column("item"), own)
            for reason, bad in faults.items():
                if pc.any(bad).as_py():
                    row = pc.index(bad, True).as_py()
                    value = batch.column("item")[row].as_py()
                    found_value = "" if value is None else str(value)[:40]
                    raise UserError(
                        f"{source.path}: {source.place(row)}: {reason} in {source.columns['item']} ({found_value!r}): expected "
                        "the id of an item"
                    )
            found.append(numbers)
            for name, arrays in texts.items():
                arrays.append(_as_text(source, name, batch.column(name)))
        if source.broken_lines:
            expected = f"wrong number of fields, expected {len(source.layout.names)}"
            if source.kind == "json":
                expected = "expected a JSON object with each key once"
            raise UserError(f"{source.path}: line {source.broken_lines[0]}: {expected}")
        if not found:
            raise UserError(f"{source.path}: no rows: expected one item per row")
        all_ids = from_bits(pa.concat_arrays(found), own.unsigned)
        table = cls(source, all_ids, {name: pa.concat_arrays(of) for name, of in texts.items()})
        table._require_distinct()
        return table

    def join(self, raw_items: pa.Array, earlier: Mapping[str, pa.Array]) -> tuple[dict[str, pa.Array], dict[str, Any]]:
        """The columns of items.parquet in the order of ``raw_items``, and a record for dataset.json.

        Args:
            earlier: the columns that the set has already; they stay where this file has no value.
        """
        ids = _of_type(self.ids, raw_items.type)
        rows = pc.index_in(raw_items, value_set=ids)
        columns = dict(earlier)
        for name, values in self.columns.items():
            mine = values.take(rows)
            columns[name] = pc.coalesce(mine, columns[name]) if name in columns else mine
        unknown = pc.invert(pc.is_in(ids, value_set=raw_items))
        record = {
            **file_record(self.source.path),
            "columns": self.source.columns,
            "rows": len(ids),
            "items_without_row": rows.null_count,
            "unknown_ids": pc.sum(unknown).as_py(),
            "first_unknown": [str(value) for value in self.ids.filter(unknown)[:FIRST_UNKNOWN].to_pylist()],
        }
        return columns, record

    def _require_distinct(self) -> None:
        encoded = np.asarray(self.ids.dictionary_encode().indices)
        _, first = np.unique(encoded, return_index=True)
        if first.size < encoded.size:
            row = int(np.setdiff1d(np.arange(encoded.size), first)[0])
            before = int(first[encoded[row]])
            raise UserError(
                f"{self.source.path}: row {row}: item {self.ids[row].as_py()} is also in row {before} (from 0): expected "
                "each item once"
            )


def earlier_columns(columns: Mapping[str, pa.Array], count: int) -> dict[str, pa.Array]:
    """``columns`` of the first items, with nulls for the others of ``count``."""
    return {
        name: pa.concat_arrays([values, pa.nulls(count - len(values), values.type)]) for name, values in columns.items()
    }


def _of_type(ids: pa.Array, kind: pa.DataType) -> pa.Array:
    """``ids`` as ``kind``, the type of the set's ids; null where only the other of int64 and uint64 has the number."""
    if ids.type == kind or not pa.types.is_integer(ids.type):
        return ids
    bits = as_bits(ids)
    return from_bits(pc.if_else(pc.less(bits, 0), None, bits), pa.types.is_unsigned_integer(kind))


def _as_text(source: SourceFile, name: str, column: pa.Array) -> pa.Array:
    column = plain(column)
    if pa.types.is_nested(column.type):
        raise UserError(f"{source.path}: column {source.columns[name]!r} holds {column.type}, expected text or numbers")
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None)
        exact = pc.and_(pc.equal(pc.floor(column), column), pc.less_equal(pc.abs(column), 2.0**53))
        if pc.all(exact).as_py():
            column = column.cast(pa.int64())
    text = trimmed(column.cast(pa.string()))
    if pc.any(pc.match_substring(text, REPLACEMENT)).as_py():
        row = pc.index(pc.match_substring(text, REPLACEMENT), True).as_py()
        raise UserError(f"{source.path}: {source.place(row)}: {source.columns[name]} is not UTF-8")
    return pc.if_else(is_missing(text), pa.scalar(None, pa.string()), text)
