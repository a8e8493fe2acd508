"""Lets `mme prepare` resume with the events that an interrupted run has read and cleaned.

They are in the event store of the work folder. After all files have been read, `read.json` is written next to it, with the counts
and the identity of what was read: sizes, modification times and versions of the inputs, the settings, the prior set. The next
run with the same identity resumes from there; any other run clears the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mme.data.layout import FORMAT_VERSION, INFO_FILE
from mme.files import is_regular, read_json, read_text, remove, write_text
from mme.prepare.input_file import InputFile, identity
from mme.prepare.manifest import Settings

WORK_FOLDER = "work"
READ_FILE = "read.json"
STORE_FILES = ("events.duckdb", "events.duckdb.wal")


class WorkFolder:
    """The folder of temporary files while a set is made.

    Attributes:
        found: what an interrupted run with the same identity passed to `keep`; None if there was none.
    """

    def __init__(self, partial: Path, inputs: Iterable[InputFile], settings: Settings, prior: Path | None) -> None:
        """``partial`` is the folder that contains the work folder, ``prior`` the folder of the set to which events are added."""
        self.path = partial / WORK_FOLDER
        self._identity = _identity(inputs, settings, prior)
        self.found = self._read()
        if self.found is None:
            self.remove()
            self.path.mkdir()
        else:
            for path in self.path.iterdir():
                if path.name not in (READ_FILE, *STORE_FILES):
                    remove(path)

    def keep(self, found: dict[str, Any]) -> None:
        """Records that all files have been read: if this run is interrupted later, the next one resumes with ``found``."""
        text = json.dumps({"identity": self._identity, "found": found})
        write_text(self.path / READ_FILE, text, self.path)

    def remove(self) -> None:
        """Removes the folder, beginning with the file that marks it as usable."""
        (self.path / READ_FILE).unlink(missing_ok=True)
        remove(self.path)

    def _read(self) -> dict[str, Any] | None:
        database, log = (self.path / name for name in STORE_FILES)
        if not is_regular(database, self.path) or log.is_symlink():  # killed while the folder was removed, or not ours
            return None
        try:
            state = read_json(self.path / READ_FILE, self.path)
        except (OSError, ValueError):
            return None
        is_same = isinstance(state, dict) and state.get("identity") == self._identity
        return state.get("found") if is_same else None


def _identity(inputs: Iterable[InputFile], settings: Settings, prior: Path | None) -> str:
    files = [identity(path) for path in inputs]
    older = read_text(prior / INFO_FILE, prior) if prior else ""
    return hashlib.sha256((repr((FORMAT_VERSION, settings.to_dict(), files)) + older).encode()).hexdigest()
