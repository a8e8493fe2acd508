"""Holds the serving model and replaces it by a newer one without losing requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mme.errors import NonFiniteError, UserError, print_line
from mme.inference.model import TrainedModel
from mme.inference.requests import Answer, RecommendationRequest


class ModelHolder:
    """Loads a run or an export, and reloads it when it has changed on disk.

    A batch keeps the model with which it began, so a reload does not affect requests in progress.

    Args:
        path: a run's folder or an export's file.
        version_of: returns the version of the model at a path, such as a run's best checkpoint.
        load: loads the model at a path.
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
        """The answers in order; a wrong request gets its error without affecting the others."""
        return self._model.answer(requests)

    def reload(self) -> str | None:
        """Loads the model if it has changed; returns ``loaded``, ``failed``, or None if it has not changed.

        A model that cannot be loaded is retried only when it changes again.
        """
        try:
            version = self._version_of(self._path)
        except (OSError, UserError):
            return None  # it is being replaced
        if version == self._version:
            return None
        self._version = version
        try:
            self._model = self._load(self._path)
        except (OSError, UserError, NonFiniteError) as error:
            print_line(f"reload failed, the previous model keeps serving: {error}")
            return "failed"
        print_line(f"now serving {self.name}")
        return "loaded"
