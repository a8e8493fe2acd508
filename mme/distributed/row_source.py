"""Tables that continue the rows of a checkpoint with fewer, or other, items and feature values.

A `RowSource` gives, for each row of the tables, the row of the checkpoint that it continues. All other rows are new: their
weights are drawn as in a new model or set to the mean of the continued rows of their kind (`model.new_items`), and their
optimizer states are zero.

Legend: R rows of a table, R' rows of the checkpoint's table, M tables, d view width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mme.distributed.checkpoint_index import ROWS, PieceEntry
from mme.distributed.recommender import Recommender
from mme.distributed.state import Piece

TABLES = "tables/"  # the names of the tables' pieces begin with it
NEW = -1
ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class RowSource:
    """Which row of a checkpoint each row of the tables continues.

    Attributes:
        blocks: the rows of each kind in the tables, R in total, such as those of the items; see `FeatureRows.blocks`.
        saved: the same in the checkpoint, R' in total.
        matches: by kind, (rows of the block,) int64, the place in the checkpoint's block that each row continues, or `NEW`.
            None: each row continues the one at its own place, and rows beyond those of the checkpoint are new.
    """

    blocks: Mapping[str, range]
    saved: Mapping[str, range]
    matches: Mapping[str, Tensor] | None = None

    @property
    def num_saved(self) -> int:
        """R', the rows of a table in the checkpoint."""
        return max(block.stop for block in self.saved.values())

    def rows(self, wanted: range) -> Tensor:
        """(len(wanted),) int64, the checkpoint's row that each of these rows continues, or `NEW`."""
        found = torch.full((len(wanted),), NEW)
        for name, block in self.blocks.items():
            low, high = max(wanted.start, block.start), min(wanted.stop, block.stop)
            if low < high and name in self.saved:
                places = self._places(name, range(low - block.start, high - block.start))
                continued = torch.where(places == NEW, NEW, places + self.saved[name].start)
                found[low - wanted.start : high - wanted.start] = continued
        return found

    def is_new(self, wanted: range) -> Tensor:
        """(len(wanted),) bool, whether each of these rows is new."""
        return self.rows(wanted) == NEW

    def num_new(self) -> dict[str, int]:
        """The number of new rows of each kind."""
        return {name: len(block) - self.num_continued(name) for name, block in self.blocks.items()}

    def num_continued(self, name: str) -> int:
        """The number of rows of a kind that continue one of the checkpoint."""
        if name not in self.saved:
            return 0
        if self.matches is None:
            return min(len(self.blocks[name]), len(self.saved[name]))
        return int((self.matches[name] != NEW).sum())

    def _places(self, name: str, wanted: range) -> Tensor:
        if self.matches is not None:
            return self.matches[name][wanted.start : wanted.stop]
        places = torch.arange(wanted.start, wanted.stop)
        return torch.where(places < len(self.saved[name]), places, NEW)


def continue_rows(piece: Piece, source: RowSource, parts: Sequence[tuple[Path, PieceEntry]]) -> None:
    """Copies the continued rows of a table's piece, or of its optimizer state's, from the checkpoint; other rows stay.

    Args:
        piece: a part of a table or of its optimizer state.
        parts: the checkpoint's parts of the tensor, each with its file.
    """
    target = piece.read()
    first = piece.offsets[0]
    wanted, order = source.rows(range(first, first + piece.local_shape[0])).sort()
    for path, part in parts:
        columns = _common_columns(piece, part)
        if columns is None:
            continue
        in_piece, in_part = columns
        with safe_open(path, framework="pt") as file:
            saved = file.get_slice(part.key)
            if part.rows is not None:  # only changed rows, which replace those of the parts before
                rows = part.offsets[0] + file.get_tensor(part.key + ROWS)
                has = torch.isin(wanted, rows)
                read_at, write_at = (slice(None), *in_part), (order[has].to(target.device), *in_piece)
                target[write_at] = saved[read_at][torch.searchsorted(rows, wanted[has])].to(target.device)
                continue
            for start in range(0, part.local_shape[0], ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, part.local_shape[0])
                bounds = part.offsets[0] + torch.tensor([start, stop])
                here = slice(*torch.searchsorted(wanted, bounds).tolist())
                if here.start < here.stop:
                    read_at, write_at = (slice(start, stop), *in_part), (order[here].to(target.device), *in_piece)
                    target[write_at] = saved[read_at][wanted[here] - bounds[0]].to(target.device)
    if piece.is_copy:
        piece.write(target)


def _common_columns(piece: Piece, part: PieceEntry) -> tuple[list[Any], list[Any]] | None:
    """The columns that both have, as slices of the piece and of the part; None if there are none.

    A state of one value per row has no columns.
    """
    in_piece: list[Any] = []
    in_part: list[Any] = []
    for own, size, other, other_size in zip(
        piece.offsets[1:], piece.local_shape[1:], part.offsets[1:], part.local_shape[1:], strict=True
    ):
        low, high = max(own, other), min(own + size, other + other_size)
        if low >= high:
            return None
        in_piece.append(slice(low - own, high - own))
        in_part.append(slice(low - other, high - other))
    return in_piece, in_part


@torch.no_grad()
def start_at_the_mean(recommender: Recommender, source: RowSource, left_out: Collection[str] = ()) -> None:
    """Sets each new row to the mean of the continued rows of its kind, if there are any; a collective.

    The sums are float64, so that their rounding, which depends on the number of ranks, does not reach the weights.

    ``left_out``: names of pieces; tables among them, which continue none of the checkpoint's, stay as they are.
    """
    tables, world = recommender.tables, recommender.world
    num_new = source.num_new()
    for name, block in source.blocks.items():
        num_continued = source.num_continued(name)
        if not num_continued or not num_new[name]:
            continue
        sums = torch.zeros(len(tables.names), tables.dim, dtype=torch.float64, device=world.device)
        for table, rows, columns, is_new in _chunks(recommender, source, block, left_out):
            if world.rank == 0 or tables.names[table] not in tables.replicated:
                sums[table, columns] += rows[~is_new].double().sum(0)
        mean = world.sum(sums) / num_continued
        for table, rows, columns, is_new in _chunks(recommender, source, block, left_out):
            rows[is_new] = mean[table, columns].to(rows.dtype)
    tables.forget_cached_rows()


def _chunks(
    recommender: Recommender, source: RowSource, block: range, left_out: Collection[str]
) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """This rank's rows of a block in chunks: the table, the rows as a view, their columns, and (rows,) bool, whether each is new."""
    tables = recommender.tables
    for shard in tables.weights():
        if f"{TABLES}{shard.name}" in left_out:
            continue
        table, (first, left) = tables.names.index(shard.name), shard.offsets
        columns = slice(left, left + shard.tensor.shape[1])
        last = min(first + shard.tensor.shape[0], block.stop)
        for start in range(max(first, block.start), last, ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, last)
            rows = shard.tensor[start - first : end - first]
            yield table, rows, columns, source.is_new(range(start, end)).to(rows.device)
