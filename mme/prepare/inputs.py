"""Finds the files that paths, folders and patterns stand for, on this machine and in remote stores."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from mme.errors import UserError
from mme.paths import local_path, regular_file, remote_url
from mme.prepare.input_file import InputFile
from mme.remote import RemoteFile, RemotePath

AnyFile = TypeVar("AnyFile", Path, RemoteFile)

# The names of logs in published folders; KuaiRand's random log and KuaiRec's small matrix must be given explicitly.
FILES_IN_FOLDER = {
    "movielens-1m": ["ratings.dat"],
    "movielens-20m": ["ratings.csv"],
    "kuairand": ["log_standard_*.csv"],
    "kuairec": ["big_matrix.csv"],
    "parquet": ["*.parquet", "*.pq"],
    "arrow": ["*.arrow"],
    "json": ["*.json", "*.jsonl", "*.ndjson"],
    "csv": ["*.csv", "*.tsv", "*.txt"],
}
# What Hugging Face's `datasets` writes beside the rows of a folder, and its caches of intermediate results.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "cache-*.arrow")
COMPRESSED = ["", ".gz", ".bz2", ".zst", ".lz4"]
EXPECTED_INPUT = "a file of interactions"


def find_files(inputs: Sequence[str | Path], format: str) -> list[InputFile]:
    """The files that paths, folders and patterns such as ``logs/2024-*.parquet`` stand for, each group sorted by name.

    A path is local or the URL of a remote store (`mme.remote`). A folder stands for the files, at any depth, that the publisher
    of ``format`` (a name of `formats.FORMATS`) calls the log, or for all files of that kind. Hidden files and those that begin
    with an underscore don't count.

    Raises:
        UserError: there is no such file, or it is empty or not a regular file, or a store denies access.
    """
    files: list[InputFile] = []
    for given in inputs:
        url = remote_url(given)
        files += _local(local_path(given), format) if url is None else _remote(url, format)
    for path in files:
        if _size(path) == 0:
            raise UserError(f"{path}: empty file: expected interactions")
    return list(dict.fromkeys(files))


def _local(path: Path, format: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _log(path, files, lambda file: file.relative_to(path).parts, format)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise UserError(f"{path}: no file matches")
    return found


def _remote(url: str, format: str) -> list[RemoteFile]:
    place = RemotePath.parse(url)
    kind = place.kind()
    if kind == "file":
        return [RemoteFile.at(place)]
    if kind == "folder":
        return _log(place, place.below(), lambda file: file.parts_below(place), format)
    if not glob.has_magic(url):
        raise UserError(f"{url}: no such file")
    found = place.matching()
    if not found:
        raise UserError(f"{url}: no file matches")
    return found


def _size(path: InputFile) -> int:
    if isinstance(path, RemoteFile):
        return path.version.size
    return regular_file(path, EXPECTED_INPUT).stat().st_size


def _log(
    folder: Path | RemotePath, files: list[AnyFile], parts: Callable[[AnyFile], Sequence[str]], format: str
) -> list[AnyFile]:
    """Those of ``files``, all that are below ``folder``, that are the log; ``parts`` are a file's names below the folder."""
    visible = [
        file
        for file in files
        if not any(name.startswith((".", "_")) for name in parts(file))
        and not any(fnmatchcase(file.name, pattern) for pattern in NOT_ROWS)
    ]
    groups = [FILES_IN_FOLDER["json"] + FILES_IN_FOLDER["csv"]] if format == "amazon" else [FILES_IN_FOLDER.get(format)]
    if format == "auto":
        groups = list(FILES_IN_FOLDER.values())
    for patterns in groups:
        wanted = [pattern + ending for pattern in patterns or [] for ending in COMPRESSED]
        found = [file for file in visible if any(fnmatchcase(file.name, pattern) for pattern in wanted)]
        if found:
            _require_shards(files, found)
            return found
    names = ", ".join(pattern for patterns in groups for pattern in patterns or [])
    raise UserError(f"{folder}: no file of interactions in this folder, expected {names}")


def _require_shards(files: list[AnyFile], found: list[AnyFile]) -> None:
    """Raises UserError if a file is missing that a state.json of `datasets` names, because a copy was cut off, for example."""
    if not any(file.name.endswith(".arrow") for file in found):
        return
    present, chosen = {str(file) for file in files}, {str(file) for file in found}
    for state in (file for file in files if file.name == "state.json"):
        text = state.read() if isinstance(state, RemoteFile) else state.read_bytes()
        try:
            names = [str(entry["filename"]) for entry in json.loads(text)["_data_files"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # a file of another program
        folder = str(state)[: -len(state.name)]
        for name in names:
            if folder + name not in present:
                raise UserError(f"{state}: names {name}, but there is no such file: expected the whole data set")
            if folder + name not in chosen:
                raise UserError(f"{state}: names {name}, which is hidden or a cache: expected another name for rows")
