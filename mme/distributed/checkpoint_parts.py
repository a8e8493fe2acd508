"""The parts of a checkpoint's tensors, whole or changed since another checkpoint, and how they are put together.

An incremental checkpoint has, of each piece of the tables and of their optimizer states, only the rows that have changed since
the last whole one, its base: their numbers within the piece, ascending, under the piece's key with `ROWS`, and their values
under the key itself. All other pieces are whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from mme.distributed.checkpoint_index import ROWS, Index, PieceEntry, damage, folder, read_index
from mme.errors import NonFiniteError, UserError

VALUES_AT_ONCE = 1 << 24  # values per comparison of a piece with its copy

Parts = Sequence[tuple[Path, PieceEntry]]


class Box(Protocol):
    """The position of a piece in its tensor."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def local_shape(self) -> tuple[int, ...]: ...


def digest_of(checksums: Iterable[str]) -> str:
    """SHA-256 of the checksums of a checkpoint's files, by which an incremental checkpoint recognises its base."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def base_of(run: Path, step: int, index: Index) -> Index | str | None:
    """The index of the base of an incremental checkpoint, or one line that says what is wrong with it; None: it is whole."""
    if index.base is None:
        return None
    found = read_index(run, index.base.step)
    what = f"{folder(run, step)}: needs the checkpoint of step {index.base.step}"
    if isinstance(found, str):
        return f"{what}: {found}"
    if found.base is not None or digest_of(entry.sha256 for entry in found.files) != index.base.sha256:
        return f"{what}, which has been replaced by another one"
    return found


def checked(run: Path, step: int, rank: int = 0, size: int = 1) -> Index | UserError | NonFiniteError:
    """The index of a checkpoint, or an error that says what is wrong with it, with its base or with a file of either.

    With ``size`` > 1, only the share of the files of the process ``rank`` is read.
    """
    index = read_index(run, step)
    if isinstance(index, str):
        return UserError(index)
    base = base_of(run, step, index)
    if isinstance(base, str):
        return UserError(base)
    flaws = [damage(run, of.progress.step, of.files[rank::size]) for of in (index, base) if of is not None]
    return next((flaw for flaw in flaws if flaw is not None), index)


def parts_of(run: Path, index: Index) -> dict[str, list[tuple[Path, PieceEntry]]]:
    """The parts of each tensor of a sound checkpoint, each with its file, those of its base first.

    Raises:
        UserError: the base is gone, for example because a running job has removed it since the checkpoint was checked.
    """
    parts: dict[str, list[tuple[Path, PieceEntry]]] = {}
    incremental = {piece.name for entry in index.files for piece in entry.pieces if piece.rows is not None}
    base = base_of(run, index.progress.step, index)
    if isinstance(base, str):  # rows that have not changed would have no value
        raise UserError(base)
    for of in (index,) if base is None else (base, index):
        for entry in of.files:
            path = folder(run, of.progress.step) / entry.file
            for piece in entry.pieces:
                if of is index or piece.name in incremental:
                    parts.setdefault(piece.name, []).append((path, piece))
    return parts


def assemble(box: Box, parts: Parts) -> Tensor:
    """The values of a piece, (local_shape), from the parts of its tensor, which cover it; later parts replace earlier ones."""
    value = torch.empty(box.local_shape)
    for path, part in parts:
        overlap = list(_overlap(box, part))
        if any(low >= high for low, high in overlap):
            continue
        source = [slice(low - o, high - o) for (low, high), o in zip(overlap, part.offsets, strict=True)]
        target = [slice(low - o, high - o) for (low, high), o in zip(overlap, box.offsets, strict=True)]
        with safe_open(path, framework="pt") as file:
            if part.rows is None:
                value[tuple(target)] = file.get_slice(part.key)[tuple(source)]
                continue
            rows = file.get_tensor(part.key + ROWS)
            inside = slice(*torch.searchsorted(rows, torch.tensor([source[0].start, source[0].stop])).tolist())
            read_at = (inside, *source[1:])
            write_at = (rows[inside] + (part.offsets[0] - box.offsets[0]), *target[1:])
            value[write_at] = file.get_slice(part.key)[read_at]
    return value


def changed_rows(before: Tensor, now: Tensor) -> Tensor:
    """(n,) int64 numbers of the rows in which two tensors of one shape differ in a bit; ``before`` is in host memory."""
    width = max(1, now[:1].numel())
    at_once = max(1, VALUES_AT_ONCE // width)
    found = [torch.empty(0, dtype=torch.int64, device=now.device)]
    for number, (a, b) in enumerate(zip(before.split(at_once), now.split(at_once), strict=True)):
        if b.numel():
            bits, other_bits = (x.to(b.device).reshape(b.shape[0], width).view(torch.int32) for x in (a, b))
            found.append((bits != other_bits).any(1).nonzero().flatten() + number * at_once)
    return torch.cat(found)


def _overlap(box: Box, other: Box) -> Iterator[tuple[int, int]]:
    sizes = zip(box.offsets, box.local_shape, other.offsets, other.local_shape, strict=True)
    for own, own_size, start, size in sizes:
        yield max(own, start), min(own + own_size, start + size)
