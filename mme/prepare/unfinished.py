"""What an interrupted `mme prepare` leaves to the one that follows: the events that it had read and cleaned.

They stand in the event store of the work folder. When all files are read, `read.json` beside it says so, with what was
counted on the way and what was read: inputs of the same sizes and times of change, the same settings, the same prior set.
The next run of the same goes on from there; any other clears the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mme.data.layout import FORMAT_VERSION, INFO_FILE
from mme.prepare.manifest import Settings

WORK_FOLDER = "work"
READ_FILE = "read.json"
STORE_FILES = ("events.duckdb", "events.duckdb.wal")


class WorkFolder:
    """Where files are while a set is made.

    Attributes:
        found: what `keep` was given by an interrupted run of the same; None: there was none.
    """

    def __init__(self, partial: Path, inputs: Iterable[Path], settings: Settings, prior: Path | None) -> None:
        """``partial``: the folder that the work folder stands in. ``prior``: of the set that is added to."""
        self.path = partial / WORK_FOLDER
        self._identity = _identity(inputs, settings, prior)
        self.found = self._read()
        if self.found is None:
            self.remove()
            self.path.mkdir()
        else:
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in (READ_FILE, *STORE_FILES):
                    path.unlink()

    def keep(self, found: dict[str, Any]) -> None:
        """All files are read: should this run be interrupted from here on, the next goes on with ``found``."""
        file = self.path / READ_FILE
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"identity": self._identity, "found": found}))
        os.replace(partial, file)

    def remove(self) -> None:
        """The folder goes, the word that it can be used first."""
        (self.path / READ_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        if not (self.path / STORE_FILES[0]).exists():  # killed while the folder was removed
            return None
        try:
            state = json.loads((self.path / READ_FILE).read_text())
        except (OSError, ValueError):
            return None
        return state["found"] if state["identity"] == self._identity else None


def _identity(inputs: Iterable[Path], settings: Settings, prior: Path | None) -> str:
    files = []
    for path in inputs:
        status = path.stat()
        files.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    older = (prior / INFO_FILE).read_bytes() if prior else b""
    return hashlib.sha256(repr((FORMAT_VERSION, settings.to_dict(), files)).encode() + older).hexdigest()
