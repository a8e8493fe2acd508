"""dataset.json, the description of a training set, read and checked without reading the events."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from mme.data.layout import INFO_FILE, ITEMS_FILE
from mme.errors import UserError
from mme.files import read_text, sha256
from mme.records import parse_record

AGAIN = "run `mme prepare` again"

Count = Annotated[int, Field(ge=0, lt=2**62)]
NumIndices = Annotated[int, Field(ge=0, lt=2**31)]  # indices of items and feature values are int32 in the event file


class FileSum(TypedDict):
    """Size and SHA-256 of a file of the set."""

    bytes: Count
    sha256: str


class Part(TypedDict):
    """A Parquet file of whole users. Sets of an older version have no checksums."""

    file: str
    users: Count
    events: Count
    bytes: NotRequired[Count]
    sha256: NotRequired[str]


class Description(TypedDict):
    """The fields of dataset.json that reading depends on. Further fields are kept."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    name: str
    num_users: Count
    num_items: NumIndices
    num_events: Count
    sort_rule: str
    parts: list[Part]
    features: NotRequired[dict[str, NumIndices]]
    files: NotRequired[dict[str, FileSum]]
    runs: NotRequired[list[dict[str, Any]]]  # of `mme prepare`, including those with --add-to


def read_info(folder: Path) -> dict[str, Any]:
    """The content of dataset.json; see `Description`.

    Raises:
        UserError: the folder, dataset.json or items.parquet is missing, or dataset.json is malformed.
    """
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected a training set, made by `mme prepare`")
    try:
        info: dict[str, Any] = dict(parse_record(read_text(path, folder), Description))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: expected a training set's folder, made by `mme prepare`") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; {AGAIN}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; {AGAIN}") from error
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: expected a training set, made by `mme prepare`"
        ) from error
    for number, part in enumerate(info["parts"]):
        if Path(part["file"]).name != part["file"]:
            raise UserError(f"{path}: parts[{number}].file: {part['file']!r} is not in this folder; {AGAIN}")
    for key, of_part in (("num_users", "users"), ("num_events", "events")):
        found = sum(part[of_part] for part in info["parts"])
        if info[key] != found:
            raise UserError(f"{path}: {key} is {info[key]}, but its parts add up to {found}; {AGAIN}")
    if not (folder / ITEMS_FILE).is_file():
        raise UserError(f"{folder / ITEMS_FILE}: no such file: expected the item ids; {AGAIN}")
    return info


def file_sum(path: Path) -> FileSum:
    """The size and checksum of a file for dataset.json."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def require_sum(folder: Path, name: str, expected: Any) -> None:
    """Raises UserError if dataset.json has a SHA-256 for the file, in ``expected``, and the file's is different."""
    path = folder / name
    try:
        if expected and "sha256" in expected and sha256(path, folder) != expected["sha256"]:
            raise UserError(f"{path}: damaged: its SHA-256 is not the one in {INFO_FILE}; {AGAIN}")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; {AGAIN}") from error


def content_sha256(info: dict[str, Any]) -> str:
    """SHA-256 of dataset.json, which contains the checksums of the raw input; independent of the folder's path.

    The checksums of the set's own files are left out, because another version of the Parquet writer may give other bytes
    for equal events.
    """
    parts = [{key: part[key] for key in part if key not in ("bytes", "sha256")} for part in info["parts"]]
    content = {key: value for key, value in info.items() if key != "files"} | {"parts": parts}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
