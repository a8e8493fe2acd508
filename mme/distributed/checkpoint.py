"""Loads checkpoints, which are atomic, verified by checksums and independent of the number of processes.

`checkpoints/step_N/` contains one safetensors file per rank and `index.json` with the position of each piece of each
tensor, the SHA-256 of every file and the progress of training (`checkpoint_index`). An incremental checkpoint is sound only if
the whole one that it changes is, too (`checkpoint_parts`). The folder is written under another name
(`checkpoint_writer`) and renamed when all ranks have finished, so a folder with the right name is complete. It contains no
code. A damaged checkpoint is skipped with a message before anything of it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mme.distributed.checkpoint_index import (
    CHECKPOINTS,
    Index,
    folder,
    from_the_best,
    steps,
)
from mme.distributed.checkpoint_parts import assemble, checked, parts_of
from mme.distributed.engine import set_optimizer_step
from mme.distributed.recommender import Recommender
from mme.distributed.row_source import TABLES, RowSource, continue_rows
from mme.distributed.state import Piece, optimizer_pieces, weight_pieces
from mme.distributed.world import World
from mme.errors import NonFiniteError, UserError, print_line
from mme.files import remove

SET_ASIDE = ".set_aside"  # in the name of a checkpoint that led to values that are not finite
ELSEWHERE = "choose another output_dir, or train.resume=false, which removes this run's checkpoints"


def newest_sound(run: Path, world: World, note: Callable[[str], Any], advice: str) -> Index | None:
    """The index of the newest sound checkpoint; None if there is no checkpoint at all.

    ``note`` is called with one line for each damaged checkpoint that is skipped.

    Raises:
        UserError: all checkpoints are damaged; the line ends with ``advice``.
    """
    candidates = world.of_first(steps(run)[::-1])
    flaws = []
    for step in candidates:
        index = _sound_index(run, step, world)
        if isinstance(index, Index):
            return index
        note(f"checkpoint skipped: {index}")
        flaws.append(index)
    if flaws:
        raise UserError(
            f"{run / CHECKPOINTS}: no sound checkpoint among {len(flaws)}, the newest: {flaws[0]}; {advice}"
        )
    return None


def best_sound(run: Path, step: int | None, world: World, note: Callable[[str], Any] | None = None) -> Index:
    """The index of checkpoint ``step``; None: of the best sound one, see `from_the_best`.

    ``note`` is called with one line for each damaged checkpoint that is skipped; None: a line on standard error.

    Raises:
        UserError: there is no such checkpoint, or it (or every one) is damaged.
        NonFiniteError: the same, if the damage is a weight or optimizer state that is NaN or infinite.
    """
    candidates = world.of_first(from_the_best(run)) if step is None else [step]
    for candidate in candidates:
        index = _sound_index(run, candidate, world)
        if isinstance(index, Index):
            return index
        if candidate == candidates[-1]:
            raise index
        if note or world.rank == 0:
            (note or print_line)(f"checkpoint skipped: {index}")
    raise AssertionError("there is at least one candidate")


def load_training(
    run: Path,
    index: Index,
    recommender: Recommender,
    engine: Any,
    source: RowSource | None = None,
    left_out: list[str] | None = None,
) -> None:
    """Restores weights, optimizer states and the number of optimizer steps that produced them.

    Args:
        source: which rows of the checkpoint's tables the tables continue; None: they have the same rows.
        left_out: receives the names of this rank's tensors that the checkpoint does not have, or has with another shape; they
            keep their values. None: such a tensor is an error.

    Raises:
        UserError: the checkpoint belongs to another configuration.
    """
    pieces = [*weight_pieces(recommender), *optimizer_pieces(recommender)]
    _restore(run, index, pieces, f" ({ELSEWHERE})", source, left_out)
    recommender.tables.forget_cached_rows()
    recommender.tables.set_optimizer_step(index.progress.applied)
    set_optimizer_step(engine, index.progress.applied)


def load_weights(run: Path, index: Index, recommender: Recommender) -> None:
    """Restores the weights; the caller has checked that the model's items are those of the checkpoint.

    Raises:
        UserError: the checkpoint belongs to another configuration.
    """
    _restore(run, index, list(weight_pieces(recommender)))
    recommender.tables.forget_cached_rows()


def remove_all(run: Path) -> int:
    """Removes all checkpoints of the run, including those set aside; returns the number of complete ones."""
    found = steps(run)
    for step in found:
        remove_checkpoint(folder(run, step))
    for aside in (run / CHECKPOINTS).glob(f"step_*{SET_ASIDE}"):
        remove(aside)
    return len(found)


def set_aside(run: Path, step: int) -> None:
    """Renames a complete checkpoint so that no run resumes from it; an older one with that name is removed."""
    checkpoint = folder(run, step)
    aside = checkpoint.with_name(checkpoint.name + SET_ASIDE)
    remove(aside)
    checkpoint.rename(aside)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a killed process leaves nothing that looks complete."""
    nameless = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    remove(nameless)  # of a removal that was cut off
    checkpoint.rename(nameless)
    remove(nameless)


def _sound_index(run: Path, step: int, world: World) -> Index | UserError | NonFiniteError:
    """The index of a sound checkpoint, or an error that says what is wrong, the same on all ranks.

    Each rank checks its share of the files. A file that one rank does not see yet, because the file system is slow to show
    new files to other nodes, counts as missing for all.
    """
    found = checked(run, step, world.rank, world.size)
    reports: list[UserError | NonFiniteError | None] = world.gather_objects(None if isinstance(found, Index) else found)
    return next((report for report in reports if report is not None), found)


def _restore(
    run: Path,
    index: Index,
    pieces: list[Piece],
    advice: str = "",
    source: RowSource | None = None,
    left_out: list[str] | None = None,
) -> None:
    checkpoint = folder(run, index.progress.step)
    saved = parts_of(run, index)
    for piece in pieces:
        parts = saved.get(piece.name, [])
        rows = source if piece.name.startswith(TABLES) else None
        expected = piece.shape if rows is None else (rows.num_saved, *piece.shape[1:])
        if not parts or parts[0][1].shape != expected:
            if left_out is not None:
                left_out.append(piece.name)
                continue
            found = f"has shape {list(parts[0][1].shape)}" if parts else "is missing"
            raise UserError(
                f"{checkpoint}: tensor {piece.name} {found}, expected {list(expected)}: the checkpoint belongs "
                f"to another model configuration or data set{advice}"
            )
        if rows is None:
            piece.write(assemble(piece, parts))
        else:
            continue_rows(piece, rows, parts)
