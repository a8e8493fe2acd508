"""The plan of the PyTorch form for a batch: how its sequences are bundled, and their time buckets.

A plan depends only on offsets and timestamps, so one plan serves every block of a decoder, forward and backward.

Sequences of about the same length form a bundle: n sequences padded to the same length P, a multiple of 16, which batched
matrix products process together. A few sequences are padded further if that costs less than a separate bundle. The queries of
a bundle are divided into chunks of CHUNK_ROWS rows. The keys of a chunk run from the start of the sequence to the end of the
chunk, so most of what lies above the diagonal is never computed. Rows beyond the end of a sequence are zeros and add nothing.
Example with lengths [10, 150, 16, 100, 140]:

    bundle 0: P = 16, sequences 0 and 2;  bundle 1: P = 160, sequences 3, 4 and 1, chunks (rows 0..63, keys 0..63),
    (rows 64..127, keys 0..127), (rows 128..159, keys 0..159)

Legend: B sequences, T tokens, n sequences of a bundle, P its padded length, S slots (the sum of n·P).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.relative_attention.reference import NUM_TIME_BUCKETS

# A batched product of 64 rows runs at the rate of one of 96 rows, and less is computed above the diagonal.
CHUNK_ROWS = 64
# Upper bound of n·64·P in a bundle: 1 MiB of scores per group. A quarter of it takes 12% more time (64 sequences of about 165
# tokens, d = 50); four times as much gains nothing.
BUNDLE_PAIRS = 1 << 18
# The fixed cost of a chunk, expressed in pairs. For 64 sequences of 94 tokens on average and d = 50, 15 chunks instead of 27
# have 4% more pairs and take 8% less time; twice and four times this number gain less.
CHUNK_PAIRS = 4_000
# Time buckets are kept for up to this many (query, key) pairs, 64 MiB. Beyond it each chunk computes its buckets when it needs
# them, so that memory stays linear in the sequence length.
MAX_KEPT_PAIRS = 1 << 24
# The bucket of keys that are later than the query: the weight is 0 and the gradient is dropped.
MASKED_BUCKET = NUM_TIME_BUCKETS


class Bundle(NamedTuple):
    """n sequences of padded length P, in slots [slot, slot + n·P); pairs: where their buckets start, or -1 if not kept."""

    slot: int
    members: int
    length: int
    pairs: int

    def chunks(self) -> Iterator[Chunk]:
        pairs = self.pairs
        for row in range(0, self.length, CHUNK_ROWS):
            chunk = Chunk(self, row, min(row + CHUNK_ROWS, self.length), pairs)
            yield chunk
            if pairs >= 0:
                pairs += chunk.size


class Chunk(NamedTuple):
    """Query rows [row, end) of each sequence of a bundle, and their keys [0, end)."""

    bundle: Bundle
    row: int
    end: int
    pairs: int

    @property
    def rows(self) -> int:
        return self.end - self.row

    @property
    def size(self) -> int:
        return self.bundle.members * self.rows * self.end


@dataclass(frozen=True)
class TilePlan:
    """The plan of the torch backend.

    Attributes:
        bundles: in the order in which they are processed.
        max_length: the longest padded length.
        token_slots: (3, T) int64: for each token its slot, the first slot of its bundle and the bundle's number of slots.
        slot_times: (2, S) int64 seconds: for each slot the time of its token and of the event after it.
        buckets: (pairs,) int32, the (n, rows, keys) time buckets of all chunks, concatenated; empty if they are not kept.
    """

    bundles: list[Bundle]
    max_length: int
    token_slots: Tensor
    slot_times: Tensor
    buckets: Tensor
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.token_slots.shape[1]

    def rows(self, groups: int) -> tuple[Tensor, Tensor]:
        """Row indices that move (G·T, w) tokens, followed by a row of zeros, to padded rows and back.

        Padded rows are (G, n, P), one bundle after another. Returns the token of each padded row, (G·S,), and the padded row
        of each token, (G·T,).
        """
        if groups not in self._rows:
            slot, first, size = self.token_slots
            group = torch.arange(groups, device=slot.device)[:, None]
            back = (groups * first + group * size + slot - first).view(-1)
            there = torch.full((groups * self.slot_times.shape[1],), back.numel(), device=slot.device)
            there[back] = torch.arange(back.numel(), device=slot.device)
            self._rows[groups] = there, back
        return self._rows[groups]


def make_tile_plan(seq_offsets: Tensor, timestamps: Tensor) -> TilePlan:
    """Divides B jagged sequences into bundles and computes their time buckets.

    Args:
        seq_offsets: (B + 1,) int64.
        timestamps: (T + B,) int64 seconds, each sequence with one entry more than its length.
    """
    device = timestamps.device
    lengths = seq_offsets.diff().to(device)
    bundles, placed = _group(lengths.tolist())
    sequence = torch.repeat_interleave(lengths)
    token = torch.arange(sequence.numel(), device=device)
    sequence_slot, bundle_slot, bundle_slots = (
        torch.tensor(placed, dtype=torch.int64, device=device).view(-1, 3).T[:, sequence]
    )
    slot = sequence_slot + token - seq_offsets.to(device)[sequence]

    slots = sum(bundle.members * bundle.length for bundle in bundles)
    slot_times = timestamps.new_zeros(2, slots)
    slot_times[:, slot] = torch.stack([timestamps[token + sequence], timestamps[token + sequence + 1]])
    pairs = sum(chunk.size for bundle in bundles for chunk in bundle.chunks())
    buckets = torch.empty(pairs if pairs <= MAX_KEPT_PAIRS else 0, dtype=torch.int32, device=device)
    if pairs > MAX_KEPT_PAIRS:
        bundles = [bundle._replace(pairs=-1) for bundle in bundles]
    else:
        for bundle in bundles:
            for chunk in bundle.chunks():
                chunk_buckets(chunk, slot_times, out=buckets[chunk.pairs : chunk.pairs + chunk.size])
    max_length = max((bundle.length for bundle in bundles), default=0)
    return TilePlan(bundles, max_length, torch.stack([slot, bundle_slot, bundle_slots]), slot_times, buckets)


def chunk_buckets(chunk: Chunk, slot_times: Tensor, out: Tensor) -> None:
    """Writes the (n, rows, keys) time buckets of ``chunk`` to ``out``, flat int32; above the diagonal MASKED_BUCKET.

    Computes in float32 and in the order of operations of the public code, as `reference.time_bucket`, with the same result.
    """
    bundle = chunk.bundle
    times = slot_times[:, bundle.slot : bundle.slot + bundle.members * bundle.length].view(
        2, bundle.members, bundle.length
    )
    seconds = times[1, :, chunk.row : chunk.end, None] - times[0, :, None, : chunk.end]
    bucket = seconds.to(torch.float32).abs_().clamp_(min=1).log_().div_(0.301).clamp_(max=NUM_TIME_BUCKETS - 1)
    later = torch.ones(chunk.rows, chunk.rows, dtype=torch.bool, device=bucket.device).triu_(1)
    bucket[:, :, chunk.row :].masked_fill_(later, MASKED_BUCKET)
    out.view(bucket.shape).copy_(bucket)


def _group(lengths: list[int]) -> tuple[list[Bundle], list[tuple[int, int, int]]]:
    """The bundles; and for each sequence its first slot, the first slot of its bundle and the bundle's number of slots."""
    padded = _padded(lengths)
    order = [b for b in sorted(range(len(lengths)), key=padded.__getitem__) if lengths[b]]
    placed = [(0, 0, 0)] * len(lengths)
    bundles: list[Bundle] = []
    slot = pairs = first = 0
    while first < len(order):
        length = padded[order[first]]
        most = max(1, BUNDLE_PAIRS // (min(length, CHUNK_ROWS) * length))
        members = [b for b in order[first : first + most] if padded[b] == length]
        bundle = Bundle(slot, len(members), length, pairs)
        for position, b in enumerate(members):
            placed[b] = (slot + position * length, slot, len(members) * length)
        bundles.append(bundle)
        slot += len(members) * length
        pairs += sum(chunk.size for chunk in bundle.chunks())
        first += len(members)
    return bundles, placed


def _padded(lengths: list[int]) -> list[int]:
    """Rounds lengths up to multiples of 16, or to the next length in use if the added pairs cost less than the saved chunks."""
    sixteens = [16 * -(-length // 16) for length in lengths]
    numbers = Counter(length for length in sixteens if length)
    padded = {0: 0}
    together: list[int] = []
    for length, longer in itertools.pairwise([*sorted(numbers), 0]):
        together.append(length)
        members = sum(numbers[each] for each in together)
        saved = CHUNK_PAIRS * -(-length // CHUNK_ROWS)
        if not longer or members * (_pairs(longer) - _pairs(length)) > saved:
            padded |= dict.fromkeys(together, length)
            together = []
    return [padded[length] for length in sixteens]


def _pairs(length: int) -> int:
    """The number of pairs of one sequence of this padded length."""
    return sum(chunk.size for chunk in Bundle(0, 1, length, -1).chunks())
