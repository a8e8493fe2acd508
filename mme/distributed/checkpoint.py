"""Checkpoints: written whole or not at all, checked by sums, loaded at any number of processes.

`checkpoints/step_N/` holds one safetensors file a rank and `index.json`: where each piece of each tensor stands, the
SHA-256 of every file, and how far training had come. The folder is filled under another name (`checkpoint_writer`) and
renamed once all ranks have written, so a folder with the right name is complete. Nothing in it is code: numbers, names
and sums.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from mme.distributed.engine import set_optimizer_step
from mme.distributed.recommender import Recommender
from mme.distributed.state import Piece, optimizer_pieces, weight_pieces
from mme.distributed.world import World
from mme.errors import UserError

INDEX = "index.json"
FORMAT = 2
ELSEWHERE = "choose another output_dir, or train.resume=false, which removes this run's checkpoints"


@dataclass(frozen=True)
class Progress:
    """How far training has come.

    ``sequences`` of ``epoch``'s order have been trained on, by however many processes; ``skipped`` of the steps before
    changed nothing; ``evaluate``: this step is to be evaluated still; ``score`` is the validation NDCG@10 at this step,
    if it was measured. A global batch is ``shares`` times ``rank_batch``, such as "64 sequences". ``dataset`` is the
    SHA-256 of the set trained on, ``numbering`` that of its numbering ("": a checkpoint that does not say).
    """

    step: int
    epoch: int
    sequences: int
    skipped: int = 0
    evaluate: bool = False
    score: float | None = None
    shares: int = 1
    rank_batch: str = ""
    dataset: str = ""
    numbering: str = ""


def load_training(run: Path, recommender: Recommender, engine: Any, note: Any) -> Progress | None:
    """Restores weights and optimizer states from the newest sound checkpoint; None where there is none.

    ``note`` is called with one line for each damaged checkpoint that is passed over.
    """
    for step in recommender.world.of_first(steps(run)[::-1]):
        index = _sound_index(run, step, recommender.world)
        if isinstance(index, str):
            note(f"checkpoint passed over: {index}")
            continue
        _restore(run, step, index, [*weight_pieces(recommender), *optimizer_pieces(recommender)], f" ({ELSEWHERE})")
        progress = Progress(**index["progress"])
        applied = progress.step - progress.skipped
        recommender.tables.set_optimizer_step(applied)
        set_optimizer_step(engine, applied)
        return progress
    return None


def load_weights(run: Path, step: int | None, recommender: Recommender, numbering: str, note: Any = None) -> int:
    """Restores the weights of checkpoint ``step`` (None: the best by validation, else the newest) and returns its step.

    Where none is asked for, a damaged one is passed over for the next best, and ``note`` (default: a line on standard
    error) is called. ``numbering``: of the data set that the model is to read, see `mme.data.numbering`.

    Raises:
        UserError: no such checkpoint, all or the one asked for are damaged, or it belongs to another configuration
            or numbering.
    """
    candidates = recommender.world.of_first(_from_the_best(run)) if step is None else [step]
    for candidate in candidates:
        index = _sound_index(run, candidate, recommender.world)
        if not isinstance(index, str):
            if index["progress"].get("numbering", "") not in ("", numbering):
                raise UserError(
                    f"{folder(run, candidate)}: was trained on a data set that numbers items, or values of features, in "
                    f"another way than {recommender.config.data.path} does now"
                )
            _restore(run, candidate, index, list(weight_pieces(recommender)))
            return candidate
        if candidate != candidates[-1] and (note or recommender.world.rank == 0):
            (note or partial(print, file=sys.stderr))(f"checkpoint passed over: {index}")
    raise UserError(index)


def remove_all(run: Path) -> int:
    """Removes all complete checkpoints of the run; returns how many there were."""
    found = steps(run)
    for step in found:
        remove(folder(run, step))
    return len(found)


def remove(checkpoint: Path) -> None:
    """Takes its name away first: a process that is killed meanwhile leaves nothing that looks complete."""
    nameless = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    checkpoint.rename(nameless)
    shutil.rmtree(nameless)


def steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints, rising."""
    names = [path.name for path in (run / "checkpoints").glob("step_*") if (path / INDEX).is_file()]
    return sorted(int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdigit())


def best_step(run: Path) -> int:
    """The complete checkpoint with the highest validation score, else the newest.

    Raises:
        UserError: there is none.
    """
    return _from_the_best(run)[0]


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step}"


def piece_key(name: str, offsets: tuple[int, ...]) -> str:
    """The name of a piece in its file."""
    return f"{name}@{','.join(map(str, offsets))}"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _from_the_best(run: Path) -> list[int]:
    """The complete checkpoints, one at least, by falling validation score, of equal ones the newest first."""
    found = steps(run)
    if not found:
        raise UserError(f"{run / 'checkpoints'}: no complete checkpoint (expected folders step_N with {INDEX})")
    return sorted(found, key=lambda step: (_score(run, step), step), reverse=True)


def _score(run: Path, step: int) -> float:
    index = _read_index(run, step)
    score = None if isinstance(index, str) else index["progress"]["score"]
    return -1.0 if score is None else score


def _read_index(run: Path, step: int) -> dict[str, Any] | str:
    """The index, or one line that says what is wrong with it."""
    path = folder(run, step) / INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            return f"{path}: format {index['format']!r}, expected {FORMAT}: another version of mme has written it"
        for entry in index["files"]:
            if Path(entry["file"]).name != entry["file"]:
                raise ValueError(f"file {entry['file']!r} is not in this folder")
            for piece in entry["pieces"]:
                piece["offsets"], piece["local_shape"] = tuple(piece["offsets"]), tuple(piece["local_shape"])
        if Progress(**index["progress"]).step != step:
            raise ValueError(f"it is of step {index['progress']['step']!r}")
    except FileNotFoundError:
        available = ", ".join(map(str, steps(run))) or "none"
        return f"{path.parent}: no such checkpoint (complete ones: {available})"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{path}: damaged index ({error})"
    return index


def _sound_index(run: Path, step: int, world: World) -> dict[str, Any] | str:
    """The index of a checkpoint whose files are as it says, or one line that says what is wrong, the same on all ranks.

    Each rank checks its share of the files, by their sums. What one rank does not see yet, on a file system that tells
    nodes of new files late, counts as missing for all.
    """
    index = _read_index(run, step)
    reports: list[Any] = [None] * world.size
    dist.all_gather_object(reports, index if isinstance(index, str) else _damage(run, step, index, world))
    return next((report for report in reports if report), index)


def _damage(run: Path, step: int, index: dict[str, Any], world: World) -> str | None:
    found = None
    for entry in index["files"][world.rank :: world.size]:
        path = folder(run, step) / entry["file"]
        try:
            if sha256(path) != entry["sha256"]:
                found = f"{path}: damaged: its SHA-256 is not the one in {INDEX}"
            elif lacking := _lacking(path, entry["pieces"]):
                found = f"{path}: damaged: no piece {lacking}, which {INDEX} names"
        except OSError as error:
            found = f"{path}: {error.strerror}"
        except SafetensorError as error:
            found = f"{path}: damaged: not a safetensors file ({error})"
    return found


def _lacking(path: Path, pieces: list[dict[str, Any]]) -> str | None:
    """A piece that the file should hold and doesn't."""
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    keys = {piece_key(piece["name"], piece["offsets"]): piece["local_shape"] for piece in pieces}
    return next((key for key, shape in keys.items() if shapes.get(key) != shape), None)


def _restore(run: Path, step: int, index: Any, pieces: list[Piece], advice: str = "") -> None:
    saved: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for entry in index["files"]:
        for part in entry["pieces"]:
            saved.setdefault(part["name"], []).append((folder(run, step) / entry["file"], part))
    for piece in pieces:
        parts = saved.get(piece.name)
        if not parts or tuple(parts[0][1]["shape"]) != piece.shape:
            found = f"has shape {parts[0][1]['shape']}" if parts else "is missing"
            raise UserError(
                f"{folder(run, step)}: tensor {piece.name} {found}, expected {list(piece.shape)}: the checkpoint belongs "
                f"to another model configuration or data set{advice}"
            )
        piece.write(_assemble(piece, parts))


def _assemble(piece: Piece, parts: list[tuple[Path, dict[str, Any]]]) -> torch.Tensor:
    value = None
    for path, part in parts:
        overlap = list(_overlap(piece, part["offsets"], part["local_shape"]))
        if any(low >= high for low, high in overlap):
            continue
        source = tuple(slice(low - o, high - o) for (low, high), o in zip(overlap, part["offsets"], strict=True))
        target = tuple(slice(low - o, high - o) for (low, high), o in zip(overlap, piece.offsets, strict=True))
        with safe_open(path, framework="pt") as file:
            read = file.get_slice(piece_key(part["name"], part["offsets"]))[source]
        if value is None:
            value = torch.empty(piece.local_shape, dtype=read.dtype)
        value[target] = read
    return torch.empty(piece.local_shape) if value is None else value


def _overlap(piece: Piece, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for own, own_size, other, other_size in zip(piece.offsets, piece.local_shape, offsets, shape, strict=True):
        yield max(own, other), min(own + own_size, other + other_size)
