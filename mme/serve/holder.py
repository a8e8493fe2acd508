"""The model that serves now, and its replacement by a newer one without a lost request."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mme.errors import UserError
from mme.inference.model import TrainedModel
from mme.inference.requests import Answer, RecommendationRequest


class ModelHolder:
    """Loads a run or an export, and loads it again when it has changed on disk.

    A batch keeps the model with which it began, so a reload changes no answer that is under way.

    Args:
        path: a run's folder or an export's file.
        version_of: tells from the path which model stands there now, such as a run's best checkpoint.
        load: reads that model.
    """

    def __init__(self, path: Path, version_of: Callable[[Path], Any], load: Callable[[Path], TrainedModel]) -> None:
        self._path, self._version_of, self._load = path, version_of, load
        self._version = version_of(path)
        self._model = load(path)

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def num_items(self) -> int:
        return self._model.num_items

    def rank(self, requests: Sequence[RecommendationRequest]) -> list[Answer | Exception]:
        """The answers in order; a request that is wrong gets its error, and the others their answers."""
        return self._model.answer(requests)

    def reload(self) -> str | None:
        """``loaded`` or ``failed`` where another model has come to the path, otherwise None.

        A model that can't be loaded is tried again only when it changes.
        """
        try:
            version = self._version_of(self._path)
        except (OSError, UserError):
            return None  # being replaced at this moment
        if version == self._version:
            return None
        self._version = version
        try:
            self._model = self._load(self._path)
        except (OSError, UserError) as error:
            print(f"reload failed, the former model goes on serving: {error}", file=sys.stderr, flush=True)
            return "failed"
        print(f"now serving {self.name}", file=sys.stderr, flush=True)
        return "loaded"
