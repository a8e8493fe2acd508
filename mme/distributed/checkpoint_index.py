"""The index of a checkpoint, and the checks that the checkpoint is sound.

`checkpoints/step_N/index.json` lists the files of the checkpoint with their SHA-256 and pieces, and the progress of
training. A checkpoint is sound if the index has every field with its type, the pieces of each tensor cover it exactly,
every file matches its checksum, and every value is a finite float32, the type of all weights and optimizer states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from mme.errors import NonFiniteError, UserError
from mme.files import read_text, require_folder, sha256, sha256_of_blocks
from mme.records import parse_record

INDEX = "index.json"
FORMAT = 3
READABLE = (2, FORMAT)  # format 2 had the sums of whole files
ROWS = "#rows"  # follows the key of a piece of which only changed rows are stored, and names their numbers
CHECKPOINTS = "checkpoints"  # in a run's folder
DTYPE = "F32"
VALUES_AT_ONCE = 1 << 22  # values per check for NaN and infinity

Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass(frozen=True)
class Progress:
    """The progress of training after ``step`` steps.

    Attributes:
        step: number of steps of this run.
        sequences: number of sequences of ``epoch``, in its order, that all processes have trained on.
        skipped: number of steps that were skipped.
        skipped_in_a_row: how many of them directly precede this state.
        evaluate: whether this step still has to be evaluated.
        score: the validation NDCG@10 at this step, if it was measured.
        best_score: the highest validation NDCG@10 until this step.
        without_gain: number of evaluations since that one.
        shares, rank_batch: a global batch is ``shares`` times ``rank_batch``, such as "64 sequences".
        dataset, numbering: SHA-256 of the training set and of its numbering; "" in checkpoints of older versions.
        rows: number of table rows of the items and of each feature, as in `FeatureRows.blocks`; {} in format 2.
        steps_before: optimizer steps that had produced the weights before step 0 (`train.init_from`).
        num_runs, runs: number of runs of `mme prepare` that had made the data set, and the SHA-256 of their records.
    """

    step: Count
    epoch: Count
    sequences: Count
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    evaluate: bool = False
    score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    shares: Annotated[int, Field(ge=1)] = 1
    rank_batch: str = ""
    dataset: str = ""
    numbering: str = ""
    rows: dict[str, Count] = field(default_factory=dict)
    num_runs: Count = 0
    runs: str = ""
    steps_before: Count = 0
    best_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    without_gain: Count = 0

    @property
    def applied(self) -> int:
        """The number of optimizer steps that produced the weights."""
        return self.steps_before + self.step - self.skipped

    def evaluated(self, score: float | None) -> Progress:
        """This progress after the evaluation of its step, with the validation NDCG@10 if there is a validation split."""
        if score is None:
            return replace(self, evaluate=False)
        is_best = self.best_score is None or score > self.best_score
        return replace(
            self,
            evaluate=False,
            score=score,
            best_score=score if is_best else self.best_score,
            without_gain=0 if is_best else self.without_gain + 1,
        )


@dataclass(frozen=True)
class PieceEntry:
    """A part of a tensor: name and ``shape`` of the whole tensor, and ``offsets`` and ``local_shape`` of the part.

    ``rows``: how many of its rows the checkpoint has; the others are those of its base. None: all.
    """

    name: str
    shape: tuple[Count, ...]
    offsets: tuple[Count, ...]
    local_shape: tuple[Count, ...]
    rows: Count | None = None

    @property
    def key(self) -> str:
        """The name of the piece in its file."""
        return f"{self.name}@{','.join(map(str, self.offsets))}"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the values in the file."""
        return self.local_shape if self.rows is None else (self.rows, *self.local_shape[1:])


@dataclass(frozen=True)
class FileEntry:
    """The file of one rank and the pieces in it.

    Attributes:
        sha256: of the file if ``block_bytes`` is None, otherwise as by `mme.files.sha256_of_blocks`.
        block_bytes: size of the blocks; None in format 2.
    """

    file: str
    sha256: str
    pieces: list[PieceEntry]
    block_bytes: Annotated[int, Field(ge=1 << 20)] | None = None

    def has_sum(self, path: Path, run: Path) -> bool:
        """Whether the file at ``path`` has this checksum."""
        if self.block_bytes is None:
            return sha256(path, run) == self.sha256
        return sha256_of_blocks(path, run, self.block_bytes) == self.sha256


@dataclass(frozen=True)
class Base:
    """The whole checkpoint that an incremental one changes: its step and the SHA-256 of its files' checksums."""

    step: Count
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json.

    Attributes:
        num_files: detects a lost entry; None in indices of older versions.
        base: None: the checkpoint is whole.
    """

    format: int
    progress: Progress
    files: list[FileEntry]
    num_files: int | None = None
    base: Base | None = None


def folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step_{step}"


def steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints, ascending.

    Raises:
        UserError: the path of the checkpoints' folder is something else, such as a link.
    """
    checkpoints = run / CHECKPOINTS
    try:
        if not require_folder(checkpoints, run):
            return []
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: expected the folder of the run's checkpoints") from error
    found = [re.fullmatch(r"step_(0|[1-9]\d*)", path.name, re.ASCII) for path in checkpoints.iterdir()]
    return sorted(int(name[1]) for name in found if name and (checkpoints / name[0] / INDEX).is_file())


def best_step(run: Path) -> int:
    """The first step of `from_the_best`.

    Raises:
        UserError: there is no complete checkpoint.
    """
    return from_the_best(run)[0]


def from_the_best(run: Path) -> list[int]:
    """The steps of the complete checkpoints by descending validation score; ties go to the newest.

    Scores from before the data set has grown do not compare, so the checkpoints of the set's newest state come first.

    Raises:
        UserError: there is no complete checkpoint.
    """
    found = steps(run)
    if not found:
        raise UserError(f"{run / CHECKPOINTS}: no complete checkpoint (expected folders step_N with {INDEX})")
    progress = {step: index.progress for step in found if not isinstance(index := read_index(run, step), str)}
    newest = progress[max(progress)].dataset if progress else ""

    def quality(step: int) -> tuple[bool, float, int]:
        if step not in progress:
            return False, -1.0, step
        score = progress[step].score
        return progress[step].dataset == newest, -1.0 if score is None else score, step

    return sorted(found, key=quality, reverse=True)


def read_index(run: Path, step: int) -> Index | str:
    """The index, or one line that says what is wrong with it."""
    path = folder(run, step) / INDEX
    try:
        text = read_text(path, run)
        found = re.search(r'"format":\s*(\d+)', text[:200])
        if found and int(found[1]) not in READABLE:
            return f"{path}: format {found[1]}, expected {FORMAT}: written by another version of mme"
        index = parse_record(text, Index)
    except FileNotFoundError:
        available = ", ".join(map(str, steps(run))) or "none"
        return f"{path.parent}: no such checkpoint (complete ones: {available})"
    except UnicodeDecodeError as error:
        return f"{path}: damaged index (byte {error.start} is not UTF-8)"
    except ValueError as error:
        return f"{path}: damaged index ({error})"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    flaw = _flaw(index, step)
    return index if flaw is None else f"{path}: damaged index ({flaw})"


def damage(run: Path, step: int, files: Sequence[FileEntry]) -> UserError | NonFiniteError | None:
    """What is wrong with one of the files, as an error to raise or to report; None if all are sound."""
    for entry in files:
        path = folder(run, step) / entry.file
        try:
            if not entry.has_sum(path, run):
                return UserError(f"{path}: damaged: its SHA-256 is not the one in {INDEX}")
            if flaw := _flaw_of_file(path, entry.pieces):
                return UserError(f"{path}: damaged: {flaw}")
            if spoiled := _not_finite(path, entry.pieces):
                return NonFiniteError(f"{path}: damaged: {spoiled}")
        except OSError as error:
            return UserError(f"{error.filename or path}: {error.strerror}")
        except SafetensorError as error:
            return UserError(f"{path}: damaged: not a safetensors file ({error})")
    return None


def _flaw(index: Index, step: int) -> str | None:
    """A contradiction in an index that has all its fields; None if there is none."""
    if index.format not in READABLE:
        return f"format {index.format}, expected {FORMAT}"
    if index.progress.step != step:
        return f"belongs to step {index.progress.step}"
    if index.num_files not in (None, len(index.files)):
        return f"files: {len(index.files)} entries, expected {index.num_files}"
    pieces: dict[str, list[PieceEntry]] = {}
    for entry in index.files:
        if PurePath(entry.file).name != entry.file or "\0" in entry.file:
            return f"file {entry.file!r} is not in this folder"
        for piece in entry.pieces:
            if piece.rows is not None and (index.base is None or not piece.shape):
                return f"tensor {piece.name}: has only changed rows, but the checkpoint has no base"
            pieces.setdefault(piece.name, []).append(piece)
    return next((flaw for name, parts in pieces.items() if (flaw := _flaw_of_tensor(name, parts))), None)


def _flaw_of_tensor(name: str, pieces: list[PieceEntry]) -> str | None:
    shape = pieces[0].shape
    for piece in pieces:
        dims = {len(shape), len(piece.offsets), len(piece.local_shape)}
        ends = zip(piece.offsets, piece.local_shape, shape, strict=False)
        if piece.shape != shape or len(dims) > 1 or any(offset + size > whole for offset, size, whole in ends):
            return f"tensor {name}: the piece {piece.key} does not fit into the shape {list(shape)}"
    filled = [piece for piece in pieces if math.prod(piece.local_shape)]
    if sum(math.prod(piece.local_shape) for piece in filled) != math.prod(shape) or _overlap(filled):
        return f"tensor {name}: its pieces do not cover it exactly"
    return None


def _overlap(pieces: list[PieceEntry]) -> bool:
    """Whether two pieces share an element, found by a sweep along the axis with the most distinct offsets."""
    if len(pieces) < 2:
        return False
    axes = range(len(pieces[0].shape))
    axis = max(axes, key=lambda each: len({piece.offsets[each] for piece in pieces}))
    reached: list[PieceEntry] = []
    for piece in sorted(pieces, key=lambda each: each.offsets[axis]):
        begin = piece.offsets[axis]
        reached = [other for other in reached if other.offsets[axis] + other.local_shape[axis] > begin]
        for other in reached:
            bounds = zip(piece.offsets, piece.local_shape, other.offsets, other.local_shape, strict=True)
            if all(max(a, b) < min(a + m, b + n) for a, m, b, n in bounds):
                return True
        reached.append(piece)
    return False


def _flaw_of_file(path: Path, pieces: list[PieceEntry]) -> str | None:
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for piece in pieces:
            values = file.get_slice(piece.key) if piece.key in keys else None
            if values is None or tuple(values.get_shape()) != piece.stored_shape:
                return f"has no piece {piece.key}, which {INDEX} names"
            if values.get_dtype() != DTYPE:
                return f"piece {piece.key} is {values.get_dtype()}, expected {DTYPE}"
            if piece.rows is not None and not _has_rows(file, piece):
                return f"the numbers of the rows of piece {piece.key} do not rise within its {piece.local_shape[0]}"
    return None


def _has_rows(file: Any, piece: PieceEntry) -> bool:
    """Whether the file has the numbers of a piece's changed rows, ascending and within the piece."""
    if piece.key + ROWS not in set(file.keys()):
        return False
    rows = file.get_tensor(piece.key + ROWS)
    if rows.dtype != torch.int64 or tuple(rows.shape) != (piece.rows,):
        return False
    return not piece.rows or bool(rows[0] >= 0 and rows[-1] < piece.local_shape[0] and (rows.diff() > 0).all())


def _not_finite(path: Path, pieces: list[PieceEntry]) -> str | None:
    """Names the piece with a NaN or infinity, and the row of its tensor; None if all values are finite."""
    with safe_open(path, framework="pt") as file:
        for piece in pieces:
            values = file.get_slice(piece.key)
            if not piece.local_shape:
                if not torch.isfinite(values[...]):
                    return f"piece {piece.key} is not finite"
                continue
            rows = max(1, VALUES_AT_ONCE // max(1, math.prod(piece.local_shape[1:])))
            for first in range(0, piece.stored_shape[0], rows):
                is_finite = torch.isfinite(values[first : first + rows])
                if not is_finite.all():
                    row = first + int((~is_finite).nonzero()[0, 0])
                    row = row if piece.rows is None else int(file.get_tensor(piece.key + ROWS)[row])
                    row += piece.offsets[0]
                    return f"piece {piece.key} is not finite, first in row {row}"
    return None
