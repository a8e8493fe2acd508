"""Reads the training set on disk to which new events are added."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mme.data.description import read_info, require_sum
from mme.data.features import parts_column, read_vocabularies
from mme.data.layout import ATTRIBUTE_PREFIX, FORMAT_VERSION, FRACTIONS, INFO_FILE, ITEMS_FILE, LEFT_OUT_FILE, TITLE
from mme.data.parquet import open_parquet
from mme.data.parts import check_files
from mme.errors import UserError
from mme.prepare.cleaning import ID_ROLES
from mme.prepare.histories import NEW, Histories, IntArray
from mme.prepare.ids import IdColumn, IdKind, as_bits
from mme.prepare.manifest import Settings

ID_KINDS: dict[str, tuple[IdKind, bool]] = {  # type in dataset.json → whether the ids are unsigned
    "int64": ("integer", False),
    "uint64": ("integer", True),
    "string": ("text", False),
}


class PriorSet:
    """
    Attributes:
        info: content of its dataset.json.
        raw_items: raw ids by item index.
        counts: (items,) int64, events of each item.
        item_columns: titles and attributes, (items,) each.
        vocabularies: feature → its values.
        features: names of the features in the parts.
        ids: kinds of the users' and items' ids.
        has_fractions: whether its times are finer than a second.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder holds no training set of interactions, or one of another version.
        """
        self.folder = folder
        self.info = _read_info(folder)
        self.settings = Settings.from_dict(self.info["settings"])
        self.ids = {role: self._ids(role) for role in ID_ROLES}
        self.has_fractions = bool(self.info.get("has_fractions"))
        self.vocabularies = read_vocabularies(folder, self.settings.feature_kinds)
        self.features = [parts_column(name) for name in self.vocabularies]
        items = _read(folder, ITEMS_FILE).sort_by("item_index")
        self.raw_items = items["item_id"].combine_chunks()
        self.counts: IntArray = items["count"].to_numpy()
        self.item_columns = {
            name: items[name].combine_chunks()
            for name in items.column_names
            if name == TITLE or name.startswith(ATTRIBUTE_PREFIX)
        }

    def user_rows(self) -> Iterator[pa.Table]:
        """A table of all users: user (raw), row."""
        row = 0
        for part in self.info["parts"]:
            for batch in _batches(self.folder, part["file"], ["user_id"]):
                yield pa.table({"user": as_bits(batch["user_id"]), "row": np.arange(row, row + batch.num_rows)})
                row += batch.num_rows

    def left_out(self) -> Iterator[pa.Table]:
        """The events left out, with the columns of `Cleaner.clean` and their place; negative positions put them before new events."""
        path = self.folder / LEFT_OUT_FILE
        if LEFT_OUT_FILE not in self.info.get("files", {}) and not os.path.lexists(path):
            return
        require_sum(self.folder, LEFT_OUT_FILE, self.info.get("files", {}).get(LEFT_OUT_FILE))
        with open_parquet(self.folder, LEFT_OUT_FILE) as file:
            position = -file.metadata.num_rows
        fractions = [FRACTIONS] if self.has_fractions else []
        for batch in _batches(
            self.folder, LEFT_OUT_FILE, ["user_id", "item_id", "timestamp", "place", *fractions, *self.features]
        ):
            yield pa.table(
                {
                    "user": as_bits(batch["user_id"]),
                    "item": as_bits(batch["item_id"]),
                    "timestamp": batch["timestamp"],
                    "fraction": batch[FRACTIONS] if fractions else np.zeros(batch.num_rows, np.int32),
                    "position": np.arange(position, position + batch.num_rows),
                    **{name: batch[name] for name in self.features},
                    "place": batch["place"].cast(pa.int32()),
                }
            )
            position += batch.num_rows

    def part(self, part: dict[str, Any], first_row: int, with_fractions: bool) -> Histories:
        """One part, whose first user has row ``first_row``; ``with_fractions`` adds `FRACTIONS`, which are 0 if the part has none."""
        require_sum(self.folder, part["file"], part)
        table = _read(self.folder, part["file"])
        columns = {name: table[name].combine_chunks() for name in ("item_ids", "timestamps")}
        codes = columns["item_ids"].flatten().to_numpy().astype(np.int32)
        values = {name: table[name].combine_chunks().flatten().to_numpy() for name in self.features}
        if with_fractions:
            has = FRACTIONS in table.column_names
            values[FRACTIONS] = (
                table[FRACTIONS].combine_chunks().flatten().to_numpy() if has else np.zeros(codes.size, np.int32)
            )
        return Histories(
            table["user_id"].combine_chunks(),
            np.arange(first_row, first_row + table.num_rows),
            columns["item_ids"].offsets.to_numpy().astype(np.int64),
            codes,
            columns["timestamps"].flatten().to_numpy(),
            np.full(codes.size, NEW, np.int32),
            values,
        )

    def _ids(self, role: str) -> IdColumn:
        name = self.info["id_types"].get(role)
        if name not in ID_KINDS:
            raise UserError(
                f"{self.folder / INFO_FILE}: id_types.{role} is {name!r}, expected one of {', '.join(ID_KINDS)}"
            )
        kind, unsigned = ID_KINDS[name]
        return IdColumn(kind, fixed=True, large=unsigned)


def _read_info(folder: Path) -> dict[str, Any]:
    path, info = folder / INFO_FILE, read_info(folder)
    version = info.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}: prepare the set again")
    if "settings" not in info:
        raise UserError(f"{path}: a generated set, expected one made of files of interactions")
    check_files(folder, info)
    return info


def _read(folder: Path, name: str) -> pa.Table:
    with open_parquet(folder, name) as file:
        return file.read()


def _batches(folder: Path, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with open_parquet(folder, name) as file:
        yield from file.iter_batches(1 << 18, columns=columns)
