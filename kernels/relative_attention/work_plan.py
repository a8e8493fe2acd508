"""The plan of the Triton form: the work of each program and the number of time buckets in each tile.

It depends only on offsets and timestamps, so one plan serves every block of a decoder, forward and backward. Everything is
computed on the device of the tensors, without a transfer.

A block consists of ``block`` consecutive tokens of one sequence; a tile consists of a block of queries and a block of keys. The
rows of the tables number the blocks of all sequences in order: with lengths [70, 0, 10] and block 64, the first sequence has
rows 0 and 1, the second none and the third row 2. A tile below the diagonal has a code c, which is derived from the earliest
and latest times of its two blocks:

    0 ≤ c < 129     the tile has buckets c − 1 and c, and no negative time difference;
    129 ≤ c < 258   the tile has only bucket c − 129;
    c < 0           the tile has buckets from (−1 − c) // 129 to (−1 − c) % 129, or its sequence is wide.

A sequence is wide if its times span 2³¹ s or more. Times of other sequences are int32 seconds since their earliest time.

Legend: B sequences, N max_seq_len, T tokens, R rows, at most T // block + B.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.relative_attention.reference import NUM_TIME_BUCKETS
from kernels.relative_attention.time_tables import time_thresholds

WIDE_SPAN = 2**31


@dataclass(frozen=True)
class WorkLists:
    """The work of the programs, largest first, and the codes of the tiles, for one block size.

    Attributes:
        query_items, key_items: (R, 4) int64, (sequence, block, row, whether the sequence is wide). A query item processes its
            own block and all earlier key blocks, a key item its own block and all later query blocks. Only the device
            knows the true length of the lists, so they are padded with sequence −1.
        counts: (ceil(N / block),) int32, the number of query items whose block number is at least the index.
        seconds: (T + B,) int32, see above; zeros for wide sequences.
        codes: (R, ceil(N / block)) int16, the code of the tile of a row's queries and an earlier key block.
        tiles: (R, ceil(N / block)) int16, the key blocks of a row whose tiles have several buckets, in order, then the others.
        tile_counts: (R,) int32, the number of tiles with several buckets.
    """

    query_items: Tensor
    key_items: Tensor
    counts: Tensor
    seconds: Tensor
    codes: Tensor
    tiles: Tensor
    tile_counts: Tensor

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the attributes."""
        return [getattr(self, name) for name in self.__dataclass_fields__]


@dataclass(frozen=True)
class WorkPlan:
    """The plan of the triton backend: work lists by block size.

    Attributes:
        any_wide: whether a sequence may be wide.
    """

    seq_offsets: Tensor
    timestamps: Tensor
    max_seq_len: int
    any_wide: bool
    _lists: dict[int, WorkLists] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.timestamps.numel() - self.seq_offsets.numel() + 1

    def lists(self, block: int) -> WorkLists:
        if block not in self._lists:
            tensors = work_lists_op(self.seq_offsets, self.timestamps, self.max_seq_len, block)
            self._lists[block] = WorkLists(*tensors)
        return self._lists[block]


# An operator, so that torch.compile keeps the bisection of `time_thresholds` out of its graph.
@torch.library.custom_op("kernels::relative_attention_work", mutates_args=())
def work_lists_op(seq_offsets: Tensor, timestamps: Tensor, max_seq_len: int, block: int) -> list[Tensor]:
    """The tensors of `make_work_lists`."""
    return make_work_lists(seq_offsets, timestamps, max_seq_len, block).tensors()


@work_lists_op.register_fake
def _(seq_offsets: Tensor, timestamps: Tensor, max_seq_len: int, block: int) -> list[Tensor]:
    num_sequences, num_blocks = seq_offsets.shape[0] - 1, -(-max_seq_len // block)
    rows = (timestamps.shape[0] - num_sequences) // block + num_sequences

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=timestamps.device)

    return [
        empty(torch.int64, rows, 4),
        empty(torch.int64, rows, 4),
        empty(torch.int32, num_blocks),
        empty(torch.int32, timestamps.shape[0]),
        empty(torch.int16, rows, num_blocks),
        empty(torch.int16, rows, num_blocks),
        empty(torch.int32, rows),
    ]


def wide_sequences(seq_offsets: Tensor, timestamps: Tensor) -> Tensor:
    """(B,) bool, whether the times of a sequence span 2³¹ s or more."""
    sequence = _sequence_of_times(seq_offsets, timestamps)
    span = _extreme(timestamps, sequence, "amax", seq_offsets.numel() - 1)
    span -= _extreme(timestamps, sequence, "amin", seq_offsets.numel() - 1)
    return (span >= WIDE_SPAN) | (span < 0)  # a span of 2⁶³ s overflows


def _sequence_of_times(seq_offsets: Tensor, timestamps: Tensor) -> Tensor:
    """(T + B,) int64, the sequence of each timestamp: offsets [0, 2, 2, 3] → [0, 0, 0, 1, 2, 2]."""
    ends = seq_offsets[1:] + torch.arange(1, seq_offsets.numel(), device=seq_offsets.device)
    time = torch.arange(timestamps.numel(), device=seq_offsets.device)
    # Offsets and timestamps that do not fit are rejected later; the clamp keeps their indices valid until then.
    return torch.searchsorted(ends, time, right=True).clamp(max=max(ends.numel() - 1, 0))


def _extreme(values: Tensor, group: Tensor, reduction: str, num_groups: int) -> Tensor:
    """(num_groups,) the ``amin`` or ``amax`` of the values of each group, or 0 if it is empty."""
    return values.new_zeros(max(num_groups, 1)).scatter_reduce(0, group, values, reduction, include_self=False)[
        :num_groups
    ]


def make_work_lists(seq_offsets: Tensor, timestamps: Tensor, max_seq_len: int, block: int) -> WorkLists:
    """See `WorkLists`. Offsets [0, 70, 80] and block 64 give query items (0, 1, 1), (0, 0, 0), (1, 0, 2), then padding."""
    device = seq_offsets.device
    num_sequences = seq_offsets.numel() - 1
    num_tokens = timestamps.numel() - num_sequences
    blocks = (seq_offsets.diff() + block - 1) // block
    ends = blocks.cumsum(0)
    row = torch.arange(num_tokens // block + num_sequences, device=device)
    sequence = torch.searchsorted(ends, row, right=True)
    real = sequence < num_sequences
    sequence = sequence.clamp(max=max(num_sequences - 1, 0))
    first_row = ends - blocks
    number = torch.where(real, row - first_row[sequence], -1)
    after = torch.where(real, blocks[sequence] - 1 - number, -1)
    wide = wide_sequences(seq_offsets, timestamps)
    items = torch.stack([torch.where(real, sequence, -1), number, row, wide[sequence].long()], 1)
    distances = torch.arange(-(-max_seq_len // block), device=device)
    counts = (blocks[None, :] - distances[:, None]).clamp(min=0).sum(1).to(torch.int32)
    by_number = torch.sort(number, descending=True, stable=True).indices
    by_after = torch.sort(after, descending=True, stable=True).indices
    of_time = _sequence_of_times(seq_offsets, timestamps)
    earliest = _extreme(timestamps, of_time, "amin", num_sequences)
    seconds = torch.where(wide[of_time], 0, timestamps - earliest[of_time]).to(torch.int32)
    codes = _tile_codes(seq_offsets, timestamps, items, first_row[sequence], distances, block)
    single = (codes >= NUM_TIME_BUCKETS) | (distances[None, :] >= number[:, None])
    tiles = torch.sort(single.to(torch.int8), dim=1, stable=True).indices.to(torch.int16)
    return WorkLists(
        items[by_number].contiguous(),
        items[by_after].contiguous(),
        counts,
        seconds,
        codes,
        tiles,
        (~single).sum(1).to(torch.int32),
    )


def _tile_codes(
    seq_offsets: Tensor, timestamps: Tensor, items: Tensor, first_row: Tensor, key_block: Tensor, block: int
) -> Tensor:
    """(R, key blocks) int16. ``items`` are in the order of rows; ``first_row`` (R,) is the first row of an item's sequence."""
    rows = items.shape[0]
    num_tokens = timestamps.numel() - seq_offsets.numel() + 1
    token = torch.arange(num_tokens, device=timestamps.device)
    sequence = torch.searchsorted(seq_offsets[1:].contiguous(), token, right=True)
    starts = (seq_offsets.diff() + block - 1) // block
    row = (starts.cumsum(0) - starts)[sequence] + (token - seq_offsets[sequence]) // block
    key_times, next_times = timestamps[token + sequence], timestamps[token + sequence + 1]

    key_row = (first_row[:, None] + key_block[None, :]).clamp(max=max(rows - 1, 0))
    least = _extreme(next_times, row, "amin", rows)[:, None] - _extreme(key_times, row, "amax", rows)[key_row]
    most = _extreme(next_times, row, "amax", rows)[:, None] - _extreme(key_times, row, "amin", rows)[key_row]
    # If Δ takes both signs, the least |Δ| is 0.
    nearest = torch.where(least >= 0, least, (-most).clamp(min=0))
    furthest = torch.maximum(least.abs(), most.abs())
    thresholds = time_thresholds(timestamps.device)[1:].contiguous()
    low, high = (
        torch.bucketize(x.to(torch.float32), thresholds, right=True).to(torch.int16) for x in (nearest, furthest)
    )
    several = -1 - (low * NUM_TIME_BUCKETS + high)
    code = torch.where(
        low == high, NUM_TIME_BUCKETS + high, torch.where((high == low + 1) & (least >= 0), high, several)
    )
    return torch.where(items[:, 3, None] > 0, several, code).to(torch.int16)
