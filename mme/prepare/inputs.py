"""Finds the files that paths, folders and patterns stand for."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from mme.errors import UserError
from mme.paths import local_path, regular_file

# The names of logs in published folders; KuaiRand's random log and KuaiRec's small matrix must be given explicitly.
FILES_IN_FOLDER = {
    "movielens-1m": ["ratings.dat"],
    "movielens-20m": ["ratings.csv"],
    "kuairand": ["log_standard_*.csv"],
    "kuairec": ["big_matrix.csv"],
    "parquet": ["*.parquet", "*.pq"],
    "json": ["*.json", "*.jsonl", "*.ndjson"],
    "csv": ["*.csv", "*.tsv", "*.txt"],
}
COMPRESSED = ["", ".gz", ".bz2", ".zst", ".lz4"]
EXPECTED_INPUT = "a file of interactions"


def find_files(inputs: Sequence[str | Path], format: str) -> list[Path]:
    """The files that paths, folders and patterns such as ``logs/2024-*.parquet`` stand for, each group sorted by name.

    A folder stands for the files, at any depth, that the publisher of ``format`` (a name of `formats.FORMATS`) calls the
    log, or for all files of that kind. Hidden files and those that begin with an underscore don't count.

    Raises:
        UserError: there is no such file, or it is empty or not a regular file.
    """
    files: list[Path] = []
    for path in map(local_path, inputs):
        if path.is_dir():
            files += _files_in(path, format)
        elif not path.exists() and glob.has_magic(str(path)):
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))
            if not found:
                raise UserError(f"{path}: no file matches")
            files += found
        else:
            files.append(path)
    for path in files:
        if regular_file(path, EXPECTED_INPUT).stat().st_size == 0:
            raise UserError(f"{path}: empty file: expected interactions")
    return list(dict.fromkeys(files))


def _files_in(folder: Path, format: str) -> list[Path]:
    groups = [FILES_IN_FOLDER["json"] + FILES_IN_FOLDER["csv"]] if format == "amazon" else [FILES_IN_FOLDER.get(format)]
    if format == "auto":
        groups = list(FILES_IN_FOLDER.values())
    for patterns in groups:
        wanted = [pattern + ending for pattern in patterns or [] for ending in COMPRESSED]
        found = sorted({path for pattern in wanted for path in folder.rglob(pattern) if _is_visible(path, folder)})
        if found:
            return found
    names = ", ".join(pattern for patterns in groups for pattern in patterns or [])
    raise UserError(f"{folder}: no file of interactions in this folder, expected {names}")


def _is_visible(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)
