"""Training sets in a remote store: published whole or not at all, and copied to this machine to be read.

    URL/dataset.json          the description, written last; its `objects` names the folder of the other files
    URL/objects-HASH/…        the other files; HASH is of the description

An object cannot be replaced together with others. So a new set's files get names of their own, and dataset.json, which is
replaced in one step, leads from the older files to the new ones. A local set that was copied to a store as it is, with all its
files beside dataset.json, is read too.

Reading needs all events in the order of users and later any sequence at random, so a job copies the set once, verifies the
checksums, and keeps it in a cache folder under a name that contains the hash of dataset.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mme.data.description import read_info, require_sum
from mme.data.layout import FEATURES_FILE, INFO_FILE, ITEMS_FILE, OWN_FILES
from mme.errors import UserError, print_line
from mme.files import PARTIAL, flush, locked, make_folder, remove
from mme.paths import remote_url
from mme.remote import RemoteFile, RemotePath

OBJECTS, OBJECTS_PREFIX = "objects", "objects-"
MARKER = ".mme-prepare"  # written before the work begins, to find out whether the store can be written to
MAX_INFO_BYTES = 1 << 28


def local_folder(path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The folder of a training set: ``path`` itself or, if it is the URL of a remote store, a copy on this machine.

    Args:
        cache_dir: where copies are kept; None: ``mme`` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache).

    Raises:
        UserError: the remote set is missing, damaged or changes meanwhile, access is denied, or the copy can't be written.
    """
    url = remote_url(path)
    if url is None:
        return Path(path)
    root = Path(cache_dir) if cache_dir is not None else _user_cache()
    place = RemotePath.parse(url)
    description = _read_description(place)
    folder = root / "sets" / _hash(url.encode() + description)
    try:
        make_folder(folder.parent, root)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder, description):
                print_line(f"{url}: copied to {folder}")
                partial = folder.with_name(PARTIAL + folder.name)
                remove(partial)  # of a killed process
                try:
                    _copy(place, description, partial)
                    remove(folder)
                    os.rename(partial, folder)
                finally:
                    remove(partial)
                flush(folder.parent)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: the copy of {url} can't be written: {error.strerror}") from error
    return folder


@contextmanager
def set_to_write(output: str | Path, *, extend: bool = False) -> Iterator[Path]:
    """Yields the folder to write a training set to: ``output`` itself or, for a URL, a temporary one that is then published.

    Args:
        extend: the temporary folder holds a copy of the set that is there.

    Raises:
        UserError: ``output`` can't be written to or holds something else; then nothing there has changed.
    """
    url = remote_url(output)
    if url is None:
        yield Path(output)
        return
    place = RemotePath.parse(url)
    older = _require_writable(place)
    try:
        with TemporaryDirectory(prefix="mme-prepare-") as work:
            folder = Path(work) / place.name
            if extend:
                _copy_to_extend(place, folder)
            yield folder
            _publish(folder, place, older)
    finally:
        with suppress(UserError):
            place.join(MARKER).delete()


def _require_writable(place: RemotePath) -> list[RemoteFile]:
    """The files of the set that is there, without those that a killed process or another one has uploaded."""
    if place.is_bucket or place.url.startswith("hdfs:"):  # HDFS can't replace a file by a copy
        raise UserError(f"{place}: expected a folder in an object store, such as s3://BUCKET/FOLDER")
    present = [file for file in place.below() if file.name != MARKER] if place.kind() == "folder" else []
    names = [file.parts_below(place) for file in present]
    for parts in names:
        if not parts[0].startswith(OBJECTS_PREFIX) and not any(fnmatch(parts[0], own) for own in OWN_FILES):
            raise UserError(
                f"{place}: holds other files ({'/'.join(parts)}): expected a new folder, or one with only an older training set"
            )
    place.join(MARKER).write(b"")
    objects = ""
    if [INFO_FILE] in names:
        with suppress(ValueError, AttributeError):  # a damaged description names no files
            objects = json.loads(_read_description(place)).get(OBJECTS, "")
    of_set = [len(parts) == 1 or parts[0] == objects for parts in names]
    return [file for file, chosen in zip(present, of_set, strict=True) if chosen]


def _publish(folder: Path, place: RemotePath, older: list[RemoteFile]) -> None:
    """Uploads the files of ``folder``, then dataset.json, and removes the older set's files."""
    info = json.loads((folder / INFO_FILE).read_bytes())
    objects = f"{OBJECTS_PREFIX}{_hash((folder / INFO_FILE).read_bytes())}-{secrets.token_hex(4)}"
    uploaded = []
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name != INFO_FILE:
                uploaded.append(place.join(f"{objects}/{path.name}"))
                uploaded[-1].upload(path)
        # A copy within the store replaces the object in one step, even if this process is killed.
        uploaded.append(place.join(f"{objects}/{INFO_FILE}"))
        uploaded[-1].write(_dumped({**info, OBJECTS: objects}))
        uploaded[-1].copy_to(place.join(INFO_FILE))
    except BaseException:
        for file in uploaded:
            with suppress(UserError):
                file.delete()
        raise
    for file in older:
        if file.parts_below(place) != [INFO_FILE]:
            with suppress(UserError):  # the new set is complete; what stays is in nobody's way
                file.delete()


def _read_description(place: RemotePath) -> bytes:
    file = place.join(INFO_FILE)
    if file.kind() != "file":
        raise UserError(f"{place}: no {INFO_FILE}: expected a training set, made by `mme prepare`")
    if file.version.size > MAX_INFO_BYTES:
        raise UserError(f"{file}: larger than {MAX_INFO_BYTES:,} bytes: expected a training set, made by `mme prepare`")
    return file.read()


def _copy(place: RemotePath, description: bytes, folder: Path) -> None:
    """Copies the set that ``description`` describes to the new ``folder`` and verifies it."""
    try:
        info = json.loads(description)
        objects = info.pop(OBJECTS, "")
        names = [ITEMS_FILE, *info.get("files", {}), *(part["file"] for part in info["parts"])]
        if info.get("features"):
            names.append(FEATURES_FILE)
        if not all(map(_is_file_name, (*names, objects or ITEMS_FILE))):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{place.join(INFO_FILE)}: not the description of a training set") from None
    folder.mkdir(parents=True)
    for name in dict.fromkeys(names):
        place.join(f"{objects}/{name}" if objects else name).download(folder / name)
    (folder / INFO_FILE).write_bytes(_dumped(info))
    try:
        read_info(folder)
        for name, expected in {**{part["file"]: part for part in info["parts"]}, **info.get("files", {})}.items():
            require_sum(folder, name, expected)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), str(place))) from None
    if _read_description(place) != description:
        raise UserError(f"{place}: changed while it was copied; run the command again")
    for path in [*folder.iterdir(), folder]:
        flush(path)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and "/" not in name and name not in ("", ".", "..")


def _copy_to_extend(place: RemotePath, folder: Path) -> None:
    try:
        _copy(place, _read_description(place), folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: the copy of {place} can't be written: {error.strerror}"
        ) from error


def _is_whole(folder: Path, description: bytes) -> bool:
    """Whether the files of a copy are there with the sizes of the set's; cleaners of caches remove some files of a folder."""
    if not folder.is_dir():
        return False
    try:
        info = json.loads(description)
        sums = {**{part["file"]: part for part in info["parts"]}, **info.get("files", {})}
        read_info(folder)
        sizes = {name: (folder / name).stat().st_size for name in sums}
        return all(of.get("bytes", sizes[name]) == sizes[name] for name, of in sums.items())
    except (OSError, UserError):
        return False


def _user_cache() -> Path:
    """Raises UserError if there is no home folder, as in a container with a user of its own."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mme"
    except RuntimeError:
        raise UserError(
            "no home folder for copies of remote sets: expected HOME, XDG_CACHE_HOME or data.cache_dir to name a folder"
        ) from None


def _dumped(info: dict[str, Any]) -> bytes:
    return (json.dumps(info, indent=2) + "\n").encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
