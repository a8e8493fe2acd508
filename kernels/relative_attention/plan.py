"""What relative attention needs to know of a batch beside q, k and v: its tiles, masks and time buckets.

They depend on the offsets and the timestamps alone, so one plan serves every block of a decoder, forward and backward.

A tile is a block of query rows with the keys that they may see. Consecutive short sequences share a tile; a long
sequence is cut into chunks of TILE_ROWS queries, whose keys run from the sequence's start to the end of the chunk.
Example, TILE_ROWS = 64, lengths [10, 20, 100]: rows 0..29 see keys 0..29 (each its own sequence's, by a mask), rows
30..93 keys 30..93, rows 94..129 keys 30..129. No row is padded and no chunk sees a key after its end.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.relative_attention.reference import NUM_TIME_BUCKETS

# 64 rows: at 50 to 200 keys a matrix product of 64 rows runs at 0.9 of the rate of 128 rows, and half as much is
# computed above the diagonal.
TILE_ROWS = 64
# Time buckets are kept for up to this many (query, key) pairs, 64 MiB; beyond it each tile makes its own anew, so
# that memory stays linear in the sequence length.
MAX_KEPT_BUCKETS = 1 << 24
# The bucket of a pair that the mask excludes; its weight is 0 and its gradient is dropped.
MASKED_BUCKET = NUM_TIME_BUCKETS


class Tile(NamedTuple):
    """Query rows [row, row_end) and their keys [key, row_end), as token indices."""

    row: int
    row_end: int
    key: int
    bucket_offset: int  # of its buckets among the plan's; -1: not kept
    mask_offset: int  # of its same-sequence mask among the plan's; -1: one sequence, the mask is the causal triangle

    @property
    def rows(self) -> int:
        return self.row_end - self.row

    @property
    def keys(self) -> int:
        return self.row_end - self.key


@dataclass(frozen=True)
class TilePlan:
    """The plan of the torch backend.

    Attributes:
        tiles: (number of tiles, 5) int64 on the CPU, the fields of `Tile`.
        max_length: of the longest sequence.
        key_times, next_times: (T,) int64 seconds, of each token and of the event after it.
        buckets: (pairs,) int32, the (rows, keys) time buckets of each tile one after another; empty: not kept.
        masks: float32, the (rows, rows) masks of the tiles that several sequences share, one after another.
    """

    tiles: Tensor
    max_length: int
    key_times: Tensor
    next_times: Tensor
    buckets: Tensor
    masks: Tensor

    def tile_list(self) -> list[Tile]:
        return [Tile(*fields) for fields in self.tiles.tolist()]


def make_tile_plan(seq_offsets: Tensor, timestamps: Tensor) -> TilePlan:
    """The tiles, masks and time buckets of B jagged sequences.

    Args:
        seq_offsets: (B + 1,) int64.
        timestamps: (T + B,) int64 seconds, each sequence with one entry more than its length.
    """
    device = timestamps.device
    lengths = seq_offsets.diff()
    sequence = torch.repeat_interleave(lengths)
    time_index = torch.arange(sequence.numel(), device=device) + sequence
    key_times, next_times = timestamps[time_index], timestamps[time_index + 1]

    tiles, pairs, masked = _cut_tiles(seq_offsets.tolist())
    buckets = torch.empty(pairs if pairs <= MAX_KEPT_BUCKETS else 0, dtype=torch.int32, device=device)
    masks = torch.empty(masked, device=device)
    if not buckets.numel():
        tiles = [tile._replace(bucket_offset=-1) for tile in tiles]
    for tile in tiles:
        if tile.mask_offset >= 0:
            rows = sequence[tile.row : tile.row_end]
            tile_mask(tile, masks).copy_(rows[:, None] == rows[None, :]).tril_()
        if tile.bucket_offset >= 0:
            tile_buckets(tile, key_times, next_times, masks, out=buckets[tile.bucket_offset :])
    table = torch.tensor(tiles, dtype=torch.int64).view(-1, len(Tile._fields))
    max_length = max(lengths.tolist(), default=0)
    return TilePlan(table, max_length, key_times, next_times, buckets, masks)


def tile_buckets(tile: Tile, key_times: Tensor, next_times: Tensor, masks: Tensor, out: Tensor) -> Tensor:
    """Writes the (rows, keys) time buckets of ``tile`` to the head of ``out``, int32, MASKED_BUCKET where masked.

    In float32 and in the order of operations of the public code: `reference.time_bucket` gives the same integers.
    """
    seconds = next_times[tile.row : tile.row_end, None] - key_times[None, tile.key : tile.row_end]
    bucket = seconds.to(torch.float32).abs_().clamp_(min=1).log_().div_(0.301).clamp_(max=NUM_TIME_BUCKETS - 1)
    if tile.mask_offset >= 0:
        excluded = tile_mask(tile, masks) == 0
    else:
        excluded = torch.ones(tile.rows, tile.rows, dtype=torch.bool, device=bucket.device).triu_(1)
    bucket[:, tile.keys - tile.rows :].masked_fill_(excluded, MASKED_BUCKET)
    out = out[: tile.rows * tile.keys].view(tile.rows, tile.keys)
    return out.copy_(bucket)


def tile_mask(tile: Tile, masks: Tensor) -> Tensor:
    """(rows, rows), 1 where query and key are of one sequence and the key is not later; of a shared tile."""
    return masks[tile.mask_offset :][: tile.rows**2].view(tile.rows, tile.rows)


def _cut_tiles(bounds: list[int]) -> tuple[list[Tile], int, int]:
    """The tiles of sequences that end at ``bounds``, their number of (query, key) pairs and of mask entries."""
    tiles: list[Tile] = []
    pairs = masked = 0

    def add(row: int, row_end: int, key: int, shared: bool) -> None:
        nonlocal pairs, masked
        tiles.append(Tile(row, row_end, key, pairs, masked if shared else -1))
        pairs += (row_end - row) * (row_end - key)
        masked += (row_end - row) ** 2 if shared else 0

    pack_start, packed = 0, 0
    for start, end in pairwise(bounds):
        if end - pack_start > TILE_ROWS:
            if packed:
                add(pack_start, start, pack_start, packed > 1)
            pack_start, packed = start, 0
        if end - start > TILE_ROWS:
            for row in range(start, end, TILE_ROWS):
                add(row, min(row + TILE_ROWS, end), start, False)
            pack_start = end
        elif end > start:
            packed += 1
    if packed:
        add(pack_start, bounds[-1], pack_start, packed > 1)
    return tiles, pairs, masked
