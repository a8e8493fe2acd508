"""Reads configurations from YAML files with overrides, validates and writes them.

It imports nothing heavy, so that ``--help``, ``--dry-run`` and the launcher answer immediately.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from mme.config.key import keys_of
from mme.config.rules import validate
from mme.config.schema import Config
from mme.errors import UserError, first_line
from mme.files import read_text, write_text
from mme.shipped import own_or_shipped

CONFIG_FILE = "config.yaml"  # in a run's folder
MAX_YAML_BYTES = 1 << 20


def load_config(source: str | Path | Mapping[str, Any] | Config | None, overrides: list[str] | None = None) -> Config:
    """A configuration with ``key.path=value`` overrides, validated.

    Args:
        source: a YAML file, the same as nested mappings, a configuration, or None for the defaults. If the working folder has
            no ``configs/NAME.yaml``, the shipped configuration of that name is used.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type, or two values contradict
            each other.
    """
    if source is None:
        return _validated(None, None, overrides or [])
    if isinstance(source, (str, Path)):
        return _validated(source, _read_yaml(own_or_shipped(Path(source))), overrides or [])
    try:
        values = OmegaConf.structured(source) if isinstance(source, Config) else OmegaConf.create(dict(source))
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {first_line(error)}") from error
    return _validated("configuration", values, overrides or [])


def load_saved_config(run: Path) -> Config:
    """The configuration in a run's folder, as written by `save_config`.

    The folder may be untrusted: links in it are not followed, and interpolations such as ``${oc.env:HOME}``, which would
    copy the reader's environment into a report or a log, are rejected.

    Raises:
        UserError: see `load_config`.
    """
    path = run / CONFIG_FILE
    return _saved(_read_yaml(path, root=run), str(path))


def parse_saved_config(text: str, source: str) -> Config:
    """Parses the output of `dump_config`; ``source`` names it in messages, see `load_saved_config`."""
    return _saved(_parse_yaml(text, source), source)


def _saved(values: DictConfig, path: str) -> Config:
    for key, node in _nodes("", values):
        if node is not None and node._is_interpolation():
            raise UserError(
                f"{path}: {key}: {node._value()!r} is not resolved in a run's configuration: expected a value"
            )
    return _validated(path, values, [])


def changed_settings(run: Path, config: Config) -> list[str]:
    """Settings that differ from the run's saved configuration, such as ``train.lr 0.01 (was 0.004)``."""
    try:
        before = flat(load_saved_config(run))
    except UserError:  # there is none, or it was written by a version with other keys
        return []
    return [f"{key} {new} (was {before[key]})" for key, new in flat(config).items() if new != before[key]]


def load_run_config(run: Path) -> Config:
    """The configuration of a trained run, for commands that read the run on any number of processes.

    The number of processes determines the placement of experts. Files that these commands write go into ``run`` and the data
    set's folder, regardless of the configured folders.

    Raises:
        UserError: see `load_config`.
    """
    config = load_saved_config(run)
    config.parallel.expert_parallel_size = 0
    config.output_dir, config.data.cache_dir = str(run), None
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML that `load_config` can read."""
    write_text(path, dump_config(config), path.parent)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _validated(path: str | Path | None, values: DictConfig | None, overrides: list[str]) -> Config:
    schema = OmegaConf.structured(Config)
    merged = schema if values is None else _merge(schema, values, source=str(path))
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"override {override!r}: expected key.path=value, such as train.steps=100")
        try:
            value = OmegaConf.from_dotlist([override])
        except Exception as error:  # the YAML reader's errors have no common base class
            raise UserError(f"override {override!r}: {first_line(error)}") from error
        merged = _merge(merged, value, source=f"override {override!r}")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path or 'configuration'}: {missing[0]} is required, such as {missing[0]}=…")
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # an interpolation ${…} that cannot be resolved
        raise UserError(f"{path or 'configuration'}: {first_line(error)}") from error
    validate(config)
    return config


def flat(config: Config) -> dict[str, Any]:
    """Each value by its full key, such as ``train.lr``."""
    return {name: value for name, _, value in keys_of(config)}


def settings_sha256(settings: dict[str, Any]) -> str:
    """SHA-256 of values by key, independent of the keys' order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def differing_keys(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The keys whose values differ or that only one of the two has, in the order of ``first``."""
    keys = dict.fromkeys([*first, *second])
    return [key for key in keys if key not in first or key not in second or first[key] != second[key]]


def _read_yaml(path: Path, root: Path | None = None) -> DictConfig:
    try:
        text = read_text(path, root, MAX_YAML_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such configuration file") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected a configuration file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a YAML configuration: {first_line(error)}") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{path}: {where}not YAML: {reason}") from error
    except Exception as error:  # the YAML reader's errors have no common base class
        raise UserError(f"{path}: not a YAML configuration: {first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: expected a mapping of sections (data, model, …), found a list")
    return loaded


def _merge(base: Any, update: Any, source: str) -> Any:
    for key, node in _nodes("", update):
        if isinstance(node, (DictConfig, ListConfig)) and (expected := _expected_instead(base, key, node)):
            found = "a mapping" if isinstance(node, DictConfig) else "a list"
            raise UserError(f"{source}: {key}: expected {expected}, found {found}")
        if isinstance(node, AnyNode) and isinstance(node._value(), int) and abs(node._value()) >= 2**63:
            raise UserError(f"{source}: {key}: expected a number of at most 64 bits")
    try:
        return OmegaConf.merge(base, update)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        hint = _nearest_key(base, key) if type(error).__name__ == "ConfigKeyError" else ""
        reason = "unknown key" if hint is not None and type(error).__name__ == "ConfigKeyError" else first_line(error)
        raise UserError(f"{source}: {key}: {reason}{hint}") from error


def _expected_instead(base: Any, key: str, node: Any) -> str | None:
    """Describes the expected value if ``key`` must not be such a container, which OmegaConf would accept for a scalar."""
    if isinstance(node._get_parent(), ListConfig):
        return "a single value"
    try:
        known = OmegaConf.select(base, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return None  # merging reports unknown keys
    if isinstance(known, (DictConfig, ListConfig)):
        if isinstance(known, ListConfig) and isinstance(node, DictConfig):
            return "a list"
        return None
    parent, _, name = key.rpartition(".")
    section = OmegaConf.select(base, parent) if parent else base
    return "a single value" if isinstance(section, DictConfig) and name in list(section) else None


def _nodes(prefix: str, container: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key below ``container`` with its node, without resolving interpolations."""
    if container._is_none() or container._is_missing() or container._is_interpolation():
        return
    keys = range(len(container)) if isinstance(container, ListConfig) else container
    for key in keys:
        node = container._get_node(key)
        yield f"{prefix}{key}", node
        if isinstance(node, (DictConfig, ListConfig)):
            yield from _nodes(f"{prefix}{key}.", node)


def _nearest_key(base: Any, key: str) -> str:
    section, _, _ = key.rpartition(".")
    known = OmegaConf.select(base, section) if section else base
    names = [f"{section}.{name}" if section else str(name) for name in known] if known is not None else []
    near = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(names)})"
