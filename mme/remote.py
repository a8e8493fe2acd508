"""Objects of a remote store as files: `s3://bucket/key`, `gs://…`, `abfs://container@account…/path`, `hdfs://host/path`.

pyarrow opens the stores. Credentials, regions and endpoints come from the environment and the configuration files that the
store's own tools use (AWS_ACCESS_KEY_ID, ~/.aws/credentials, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …),
never from a URL, which ends up in logs.

An object can be replaced or removed by anybody while it is read, and a reader that fetches it in ranges would then mix two
versions. So a `RemoteFile` belongs to one version of its object, and every context that reads it compares the version before and
after.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pyarrow import fs

from mme.errors import UserError, first_line
from mme.paths import REMOTE_SCHEMES

_BLOCK_BYTES = 8 << 20
_GCS_RETRY_S = 60  # pyarrow's default is 15 minutes
_STORE_ERRORS = (OSError, pa.ArrowException, NotImplementedError)
_DENIED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN",
    "HTTP status 401",
    "HTTP status 403",
    "HTTP response code 401",
    "HTTP response code 403",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)


class Version(NamedTuple):
    """What distinguishes two versions of an object; ``etag`` is empty if the store has none."""

    size: int
    modified_ns: int
    etag: str


@dataclass(frozen=True)
class RemotePath:
    """A place in a remote store, whether or not something is there.

    Attributes:
        url: the URL as the user wrote it.
        path: the path that ``filesystem`` takes, such as ``bucket/key``.
    """

    url: str
    filesystem: fs.FileSystem = field(compare=False, repr=False)
    path: str = field(compare=False)

    @classmethod
    def parse(cls, url: str) -> RemotePath:
        """Opens the store of a URL with a scheme of `REMOTE_SCHEMES`.

        Raises:
            UserError: the URL has no bucket or has credentials, or its store can't be opened.
        """
        scheme, _, rest = url.partition("://")
        authority, _, key = rest.partition("/")
        if scheme not in REMOTE_SCHEMES or not authority:
            raise UserError(f"{url}: expected {scheme}://BUCKET/KEY")
        if scheme in ("s3", "gs") and "@" in authority:
            shown = f"{scheme}://…@{authority.rpartition('@')[2]}/{key}"
            raise UserError(f"{shown}: credentials in a URL end up in logs: expected them in the environment")
        try:
            filesystem, base = _open_store(scheme, authority)
        except (*_STORE_ERRORS, ValueError) as error:
            raise UserError(f"{url}: {_reason(error)}") from error
        key = key.rstrip("/")
        return cls(url, filesystem, f"{base.rstrip('/')}/{key}" if key else base)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_bucket(self) -> bool:
        """Whether this is a whole bucket or container."""
        return not self.url.partition("://")[2].partition("/")[2].strip("/")

    def __str__(self) -> str:
        return self.url

    def kind(self) -> Literal["file", "folder", ""]:
        """What is there: a file, a folder (a common prefix) or nothing.

        Raises:
            UserError: the store denies access or can't be reached.
        """
        with _named(self.url):
            info = self.filesystem.get_file_info(self.path)
        return "file" if info.is_file else "folder" if info.type == fs.FileType.Directory else ""

    def below(self) -> list[RemoteFile]:
        """All files below this folder, at any depth, sorted by path.

        Raises:
            UserError: see `kind`.
        """
        with _named(self.url):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True))
        return sorted((self._file(info.path) for info in found if info.is_file), key=lambda file: file.path)

    def matching(self) -> list[RemoteFile]:
        """The files that this path, a pattern as of `glob`, stands for, sorted by path.

        Raises:
            UserError: see `kind`; or the bucket itself has a pattern.
        """
        folders = self.url.split("/")
        depth = next(number for number, name in enumerate(folders) if has_magic(name))
        folder, pattern = RemotePath.parse("/".join(folders[:depth])), folders[depth:]
        return [file for file in folder.below() if _matches(file.parts_below(folder), pattern)]

    def parts_below(self, folder: RemotePath) -> list[str]:
        """The names on the way from ``folder`` to this path."""
        return self.path[len(folder.path.rstrip("/")) + 1 :].split("/")

    def join(self, relative: str) -> RemoteFile:
        """The file ``relative`` to this folder."""
        return self._file(f"{self.path.rstrip('/')}/{relative}")

    def _file(self, path: str) -> RemoteFile:
        relative = path[len(self.path.rstrip("/")) + 1 :]
        return RemoteFile(f"{self.url.rstrip('/')}/{relative}", self.filesystem, path)


@dataclass(frozen=True)
class RemoteFile(RemotePath):
    """One version of an object: the one that is there when `version` is first asked for or something is read."""

    @classmethod
    def at(cls, place: RemotePath) -> RemoteFile:
        return cls(place.url, place.filesystem, place.path)

    @cached_property
    def version(self) -> Version:
        """Raises UserError if there is no such object or it can't be read."""
        with _named(self.url):
            return self._present()

    @contextmanager
    def open(self, *, random_access: bool = False) -> Iterator[pa.NativeFile]:
        """Opens the object: as a stream, which a known ending of the name decompresses, or for reading any range.

        Raises:
            UserError: the object is missing, has vanished or is another version, now or at the end of the context, or the
                store fails.
        """
        self._check()
        with _named(self.url):
            if random_access:
                opened = self.filesystem.open_input_file(self.path)
            else:
                opened = self.filesystem.open_input_stream(self.path, compression="detect")
        try:
            with opened as stream:
                yield stream
        except (*_STORE_ERRORS, UnicodeDecodeError):
            self._check()  # a change of the object explains what looks like damage
            raise
        self._check()

    def read(self) -> bytes:
        """The whole content; see `open` for errors."""
        with _named(self.url), self.open(random_access=True) as stream:
            data: bytes = stream.read()
            return data

    def download(self, target: Path) -> None:
        """Copies the object as it is stored to a new local file.

        Raises:
            UserError: see `open`.
            OSError: the local file can't be written.
        """
        with target.open("xb") as file:
            for block in self._blocks():
                file.write(block)

    def write(self, data: bytes) -> None:
        """Replaces the object.

        Raises:
            UserError: the store fails or denies access.
        """
        with _named(self.url):
            stream = self.filesystem.open_output_stream(self.path, compression=None)
            stream.write(data)
            stream.close()

    def upload(self, source: Path) -> None:
        """Replaces the object by the content of a local file; see `write` for errors."""
        with _named(self.url), source.open("rb") as file:
            stream = self.filesystem.open_output_stream(self.path, compression=None)
            while block := file.read(_BLOCK_BYTES):
                stream.write(block)
            stream.close()

    def copy_to(self, target: RemotePath) -> None:
        """Copies the object within the store; ``target`` is replaced in one step. See `write` for errors."""
        with _named(target.url):
            self.filesystem.copy_file(self.path, target.path)

    def delete(self) -> None:
        """Removes the object; see `write` for errors."""
        with _named(self.url):
            self.filesystem.delete_file(self.path)

    def sha256(self) -> str:
        """The SHA-256 of the object as it is stored, in hexadecimal; see `open` for errors."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        with self.open(random_access=True) as stream:
            while True:
                with _named(self.url):
                    block = stream.read(_BLOCK_BYTES)
                if not block:
                    return
                yield block

    def _check(self) -> None:
        before = self.version
        with _named(self.url):
            try:
                now = self._present()
            except FileNotFoundError:
                raise UserError(f"{self.url}: vanished while it was read; run the command again") from None
        if now != before:
            raise UserError(
                f"{self.url}: changed while it was read (from {before.size:,} to {now.size:,} bytes); run the command again"
            )

    def _present(self) -> Version:
        info = self.filesystem.get_file_info(self.path)
        if not info.is_file:
            raise FileNotFoundError(self.path)
        with self.filesystem.open_input_file(self.path) as file:
            metadata: dict[Any, Any] = file.metadata() or {}
        etag = next((value for key, value in metadata.items() if str(key).lower() == "etag"), b"")
        return Version(info.size, info.mtime_ns or 0, etag.decode() if isinstance(etag, bytes) else str(etag))


def _open_store(scheme: str, authority: str) -> tuple[fs.FileSystem, str]:
    """The file system of a store, and the path of ``authority`` (its bucket, its container or its root) in it."""
    if scheme != "s3":
        query = f"?retry_limit_seconds={_GCS_RETRY_S}" if scheme == "gs" else ""
        filesystem, base = fs.FileSystem.from_uri(f"{scheme}://{authority}/{query}")
        return filesystem, base
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(authority)
    options: dict[str, Any] = {"region": region}
    if endpoint:
        transport, separator, host = endpoint.partition("://")
        if not separator or transport not in ("http", "https") or not host.strip("/"):
            raise ValueError(f"AWS_ENDPOINT_URL: {endpoint}: expected http://HOST:PORT or https://HOST:PORT")
        options |= {"scheme": transport, "endpoint_override": host.rstrip("/")}
    return fs.S3FileSystem(**options), authority


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turns an error of the store into one line that names ``url``."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such file") from error
    except _STORE_ERRORS as error:
        raise UserError(f"{url}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = first_line(error)
    if any(word in text for word in _DENIED):
        return f"access denied: expected credentials in the environment that may use it ({text})"
    return f"can't be used: {text}"


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (
            bool(names) and not names[0].startswith(".") and _matches(names[1:], patterns)
        )
    if not names or (names[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
