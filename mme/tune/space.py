"""The search space: the values that trials may take for each configuration key.

    train.lr: {low: 1e-4, high: 1e-2, log: true}      a float between two bounds
    model.num_blocks: {low: 1, high: 4}               an integer if both bounds are integers; step: 2 skips values
    model.dropout: {low: 0.1, high: 0.5, step: 0.1}
    model.embedding_dim: [64, 128, 256]               one of a list

Every bound and every listed value is checked against the configuration's schema before the first trial.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mme.config import load_config
from mme.errors import UserError, first_line
from mme.files import read_text

BOUNDS = {"low", "high", "step", "log"}


@dataclass(frozen=True)
class Choice:
    """One of several values, of any type that the key takes."""

    key: str
    values: tuple[Any, ...]

    def suggest(self, trial: Any) -> Any:
        """A value of this key for an Optuna trial. Values are encoded as JSON, because Optuna stores only scalars."""
        return self.decode(trial.suggest_categorical(self.key, [json.dumps(value) for value in self.values]))

    def decode(self, value: str) -> Any:
        """The value for a trial, decoded from the value that Optuna stores."""
        return json.loads(value)

    def extremes(self) -> tuple[Any, ...]:
        return self.values


@dataclass(frozen=True)
class Interval:
    """A number from ``low`` to ``high``, inclusive."""

    key: str
    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def is_integer(self) -> bool:
        return all(isinstance(bound, int) for bound in (self.low, self.high, self.step or 1))

    def suggest(self, trial: Any) -> float:
        """A value of this key for an Optuna trial."""
        if self.is_integer:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return int(trial.suggest_int(self.key, low, high, step=step, log=self.log))
        return self.decode(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    def decode(self, value: float) -> float:
        """The value for a trial, rounded from Optuna's to six digits: 0.3 for 0.30000000000000004."""
        return value if self.is_integer else float(f"{value:.6g}")

    def extremes(self) -> tuple[float, ...]:
        return self.low, self.high


def override(key: str, value: Any) -> str:
    """``key=value`` for the command line."""
    return f"{key}={json.dumps(value)}"


def read_space(path: Path, config: Path, overrides: list[str]) -> list[Choice | Interval]:
    """Reads a search space from a YAML file.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown to the configuration, a bound is missing, or a value
            has the wrong type for its key.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, expected a search space in YAML") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{path}: expected keys of the configuration with the values to try, such as model.dropout: [0.1, 0.3]"
        )
    base = load_config(config, overrides)
    space = [_parse(path, str(key), value) for key, value in content.items()]
    for entry in space:
        _require_key(path, base, entry.key)
        for value in entry.extremes():
            _require_value(path, config, overrides, entry.key, value)
    return space


def _parse(path: Path, key: str, value: Any) -> Choice | Interval:
    if isinstance(value, list) and value:
        return Choice(key, tuple(value))
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= BOUNDS:
        raise UserError(
            f"{path}: {key}: expected a list of values, or low and high (and step or log), found {json.dumps(value, default=str)}"
        )
    bounds = [value["low"], value["high"], *([] if value.get("step") is None else [value["step"]])]
    if not all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in bounds):
        raise UserError(f"{path}: {key}: low, high and step must be numbers (YAML reads 1e-3 as text: write 1.0e-3)")
    found = Interval(key, value["low"], value["high"], value.get("step"), bool(value.get("log", False)))
    if found.low > found.high:
        raise UserError(f"{path}: {key}: low ({found.low}) is above high ({found.high})")
    if found.log and (found.low <= 0 or found.step is not None):
        raise UserError(f"{path}: {key}: log needs low above 0 and no step")
    if found.step is not None and found.step <= 0:
        raise UserError(f"{path}: {key}: step ({found.step}) must be above 0")
    return found


def _require_key(path: Path, base: Any, key: str) -> None:
    place = base
    for name in key.split("."):
        if not hasattr(place, name):
            raise UserError(f"{path}: {key}: no such key in the configuration (docs/configuration.md lists them)")
        place = getattr(place, name)
    if hasattr(place, "__dataclass_fields__"):
        raise UserError(f"{path}: {key}: is a section, expected one key such as {key}.{next(iter(vars(place)))}")
    if key == "output_dir":
        raise UserError(f"{path}: output_dir: cannot be searched, because each trial has its own folder")


def _require_value(path: Path, config: Path, overrides: list[str], key: str, value: Any) -> None:
    """Rejects a value of the wrong type. A value that only contradicts other keys may fit in a trial."""
    try:
        load_config(config, [*overrides, override(key, value)])
    except UserError as error:
        if key in str(error) and "override" in str(error):
            raise UserError(f"{path}: {key}: {json.dumps(value)}: {error}") from error
