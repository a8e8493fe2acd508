"""Writes checkpoints in the background. Training waits only while its state is copied to host memory.

A thread of each rank writes and syncs that rank's file. The threads do not communicate: an all-reduce that every step
performs anyway tells all ranks whether some rank is still writing (`votes`). When none is, the ranks gather the files'
checksums, and rank 0's thread writes the index, renames the folder and removes old checkpoints. If a process is killed, it
leaves a folder with another name, which nothing reads and the next checkpoint removes.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mme.distributed.checkpoint import remove_checkpoint
from mme.distributed.checkpoint_index import (
    FORMAT,
    INDEX,
    ROWS,
    Base,
    FileEntry,
    Index,
    PieceEntry,
    Progress,
    folder,
    from_the_best,
    read_index,
    steps,
)
from mme.distributed.checkpoint_parts import changed_rows, digest_of
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import TABLES
from mme.distributed.state import Piece, optimizer_pieces, weight_pieces
from mme.errors import DISK_ERRORS, DiskError, JobError, NonFiniteError, Preempted
from mme.files import (
    HASH_BLOCK_BYTES,
    VISIBLE_WITHIN_S,
    flush,
    make_folder,
    remove,
    replacing,
    sha256_of_blocks,
    write_text,
)

WORTH_WRITING = 0.5  # an incremental checkpoint has at most this share of the rows


class CheckpointError(JobError):
    """A checkpoint could not be written, so training cannot continue safely."""


class DiskCheckpointError(CheckpointError, DiskError):
    """The disk has no space for a checkpoint."""


class NonFiniteCheckpointError(CheckpointError, NonFiniteError):
    """The state contains NaN or infinity, so training could not resume from it."""


class Part(NamedTuple):
    """The content of one piece: all ``values``, or those of the changed ``rows`` (n,) int64; in host memory."""

    entry: PieceEntry
    values: Tensor
    rows: Tensor | None = None


class CheckpointWriter:
    """Writes one checkpoint at a time. Every rank calls the methods in the same order.

    Args:
        run: the run's folder.
        keep: number of the newest checkpoints to keep, in addition to the best.
        incremental: number of incremental checkpoints between two whole ones, see `mme.distributed.checkpoint_parts`.
    """

    def __init__(self, run: Path, recommender: Recommender, keep: int, incremental: int = 0) -> None:
        self.run, self.recommender, self.world, self.keep = run, recommender, recommender.world, keep
        self.incremental = incremental
        self._host: dict[str, Tensor] = {}  # host copies of this rank's pieces, reused by each whole checkpoint
        self._base: Base | None = None  # the newest whole checkpoint that this process has written
        self._since_base = 0  # incremental ones since then
        self._thread: threading.Thread | None = None
        self._parts_of: Progress | None = None  # the checkpoint whose files are being written
        self._entry: dict[str, Any] = {}  # this rank's entry of the index
        self._failure: CheckpointError | None = None
        self._newest: int | None = None  # the step that this process wrote last or is writing

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or (isinstance(error, (JobError, Preempted)) and not isinstance(error, CheckpointError)):
            self.wait()  # all ranks take part
        elif self._thread is not None:
            self._thread.join()  # only this rank's thread, because other ranks may have died

    def save(self, progress: Progress) -> None:
        """Waits for the previous checkpoint, copies the state and starts to write `checkpoints/step_N`.

        If this step was written last, only ``progress`` is updated, because the state is the same.

        Raises:
            CheckpointError: a rank could not write the previous checkpoint.
        """
        self.wait()
        if self._newest == progress.step:
            self._start(self._write_progress, progress)
            self.wait()
            return
        self._newest = progress.step
        partial = self._partial(progress.step)
        if self.world.rank == 0:
            for left in partial.parent.glob(".step_*.partial"):
                remove(left)
        parts = self._copy_changes() if self._since_base < self.incremental else None
        if parts is None:
            self._base, self._since_base, parts = None, 0, self._copy_state()
        else:
            self._since_base += 1
        self.world.barrier()  # wait until leftovers of a killed run have been removed
        self._parts_of = progress
        self._start(self._write_part, partial, parts)

    def votes(self) -> tuple[bool, bool]:
        """This rank's votes in a step: whether it is still writing its part, and whether the completion failed."""
        writing = self._parts_of is not None and self._is_busy()
        return writing, self._parts_of is None and self._failure is not None and not self._is_busy()

    def after_step(self, any_writing: bool, any_failed: bool) -> None:
        """Completes the checkpoint if all ranks are ready; the arguments are the combined votes of all ranks.

        Raises:
            CheckpointError: a rank could not write the checkpoint.
        """
        if any_failed:
            self._raise_failure()
        if self._parts_of is not None and not any_writing:
            self._commit()

    def wait(self) -> None:
        """Waits until the checkpoint is complete on all ranks.

        Raises:
            CheckpointError: a rank could not write the checkpoint.
        """
        if self._newest is None:
            return
        if self._parts_of is not None:
            self._commit()
        self._join()
        self._raise_failure()

    def resumed_at(self, step: int) -> None:
        """Records the checkpoint from which the state was restored, so that it is not written again."""
        self._newest = step

    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        self._join()
        self._thread = threading.Thread(target=function, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _raise_failure(self) -> None:
        dist.broadcast_object_list(verdict := [self._failure], src=0)
        self._failure = None
        if verdict[0]:
            raise verdict[0]

    def _partial(self, step: int) -> Path:
        final = folder(self.run, step)
        return final.with_name(f".{final.name}.partial")

    def _copy_state(self) -> list[Part]:
        """Copies this rank's pieces to host memory; reading a piece is a collective."""
        on_gpu = self.world.device.type == "cuda"
        copies = []
        for piece in [*weight_pieces(self.recommender), *optimizer_pieces(self.recommender)]:
            value = piece.read()
            if not piece.writer:
                continue
            entry = _entry_of(piece)
            if entry.key not in self._host:
                self._host[entry.key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
            copies.append(Part(entry, self._host[entry.key].copy_(value, non_blocking=on_gpu)))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _copy_changes(self) -> list[Part] | None:
        """Copies what has changed since the base: rows of the tables and of their states, and all other pieces as a whole.

        None if there is no base, or if so many rows have changed on some rank that a whole checkpoint is hardly larger. A
        collective.
        """
        if self._base is None:
            return None
        copies, changed, total = [], 0, 0
        for piece in [*weight_pieces(self.recommender), *optimizer_pieces(self.recommender)]:
            value = piece.read()
            if not piece.writer:
                continue
            entry, rows = _entry_of(piece), None
            if piece.name.startswith(TABLES):
                rows = changed_rows(self._host[entry.key], value)
                changed, total = changed + rows.numel(), total + value.shape[0]
                entry, value = replace(entry, rows=rows.numel()), value[rows]
                rows = rows.cpu()
            copies.append(Part(entry, value.detach().to("cpu", copy=True), rows))
        is_large = torch.tensor(int(changed > WORTH_WRITING * total), device=self.world.device)
        return None if self.world.sum(is_large) else copies

    def _write_part(self, partial: Path, parts: list[Part]) -> None:
        file = partial / f"rank_{self.world.rank:05d}.safetensors"
        spoiled = next((where for part in parts if (where := _not_finite(part))), None)
        if spoiled is not None:
            error = NonFiniteCheckpointError(f"checkpoint of step {self._newest} not written: {spoiled}")
            error.step = self._newest  # training may be some steps ahead
            self._entry = {"error": error}
            return
        try:
            make_folder(partial, self.run)
            tensors = {part.entry.key: part.values for part in parts}
            tensors |= {part.entry.key + ROWS: part.rows for part in parts if part.rows is not None}
            with replacing(file, self.run) as unfinished:
                save_file(tensors, unfinished)
            entries = [part.entry for part in parts]
            self._entry = asdict(FileEntry(file.name, sha256_of_blocks(file, self.run), entries, HASH_BLOCK_BYTES))
        except (OSError, SafetensorError) as error:
            self._entry = {"error": _failure_of(file, error)}

    def _commit(self) -> None:
        """Gathers the entries of all ranks; rank 0 completes the checkpoint in its thread."""
        self._join()
        progress, self._parts_of = self._parts_of, None
        assert progress is not None
        entries: list[Any] = [None] * self.world.size
        dist.all_gather_object(entries, self._entry)
        failed = [entry["error"] for entry in entries if "error" in entry]
        if failed:
            self._failure = failed[0]
            if self.world.rank == 0:
                remove(self._partial(progress.step))
            self._raise_failure()
        base = self._base  # None: this checkpoint is whole, and the base of the next ones
        if base is None:
            self._base = Base(progress.step, digest_of(entry["sha256"] for entry in entries))
        if self.world.rank == 0:
            self._start(self._complete, progress, entries, base)

    def _complete(self, progress: Progress, entries: Sequence[dict[str, Any]], base: Base | None) -> None:
        final, partial = folder(self.run, progress.step), self._partial(progress.step)
        try:
            missing = _first_missing([partial / entry["file"] for entry in entries])
            if missing is not None:
                remove(partial)
                self._failure = CheckpointError(
                    f"checkpoint not written: rank 0 does not see {missing}, which another rank has written: expected one "
                    "output_dir that all nodes share"
                )
                return
            index = {"format": FORMAT, "num_files": len(entries), "progress": asdict(progress), "files": entries}
            if base is not None:
                index["base"] = asdict(base)
            write_text(partial / INDEX, json.dumps(index), self.run)
            if final.exists():  # it is damaged; otherwise the run would have resumed from it
                remove_checkpoint(final)
            partial.rename(final)
            flush(final.parent)
            self._prune(progress.step)
        except OSError as error:
            remove(partial)
            self._failure = _failure_of(final, error)

    def _write_progress(self, progress: Progress) -> None:
        final = folder(self.run, progress.step)
        try:
            if self.world.rank == 0:
                index = read_index(self.run, progress.step)
                if isinstance(index, str):
                    self._failure = CheckpointError(f"checkpoint not written: {index}")
                else:
                    write_text(final / INDEX, json.dumps(asdict(replace(index, progress=progress))), self.run)
        except OSError as error:
            self._failure = _failure_of(final / INDEX, error)

    def _prune(self, newest: int) -> None:
        # Later checkpoints were skipped as damaged when this run resumed, and do not count.
        found = [step for step in steps(self.run) if step <= newest]
        best = next(step for step in from_the_best(self.run) if step <= newest)
        kept = {*found[-self.keep :], best}
        indices = [index for step in kept if isinstance(index := read_index(self.run, step), Index)]
        kept |= {index.base.step for index in indices if index.base is not None}
        for step in set(found) - kept:
            remove_checkpoint(folder(self.run, step))


def _first_missing(paths: Sequence[Path]) -> Path | None:
    """The first file that does not appear within `VISIBLE_WITHIN_S`; None if all are there."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    for path in paths:
        while not path.is_file():
            if time.monotonic() > deadline:
                return path
            time.sleep(0.1)
    return None


def _entry_of(piece: Piece) -> PieceEntry:
    return PieceEntry(piece.name, piece.shape, piece.offsets, piece.local_shape)


def _failure_of(path: Path, error: Exception) -> CheckpointError:
    """The error for a failed write. safetensors gives the system's error number only in its message."""
    number = error.errno if isinstance(error, OSError) else None
    found = re.search(r"os error (\d+)", str(error))
    is_full = (int(found[1]) if found else number) in DISK_ERRORS
    kind = DiskCheckpointError if is_full else CheckpointError
    return kind(f"checkpoint not written: {path}: {error}")


def _not_finite(part: Part) -> str | None:
    """Names the first row of the part with a NaN or infinity; None if all values are finite.

    The minimum and maximum show whether there is one, in a single pass without allocation.
    """
    name, values = part.entry.name, part.values
    if not values.numel() or torch.stack(torch.aminmax(values)).isfinite().all():
        return None
    if not values.dim():
        return f"{name} is not finite"
    row = int((~values.isfinite()).nonzero()[0, 0])
    row = row if part.rows is None else int(part.rows[row])
    return f"{name} is not finite, first in row {part.entry.offsets[0] + row}"
