"""A configuration key as a dataclass field whose metadata contain its description and range."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DESCRIPTION, RANGE = "description", "range"


@dataclass(frozen=True)
class Range:
    """The range of a numeric key; None means no bound."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def phrase(self) -> str:
        """The range in words for an error message, such as ``at least 0 and below 1``."""
        if self == Range(above=0):
            return "positive"
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)

    def notation(self) -> str:
        """The range in symbols for a table, such as ``≥ 0, < 1``."""
        bounds = {">": self.above, "≥": self.at_least, "<": self.below, "≤": self.at_most}
        return ", ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)


def key(
    default: Any,
    description: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field. Each configuration gets a copy of a list ``default``. The bounds do not apply to None."""
    metadata: dict[str, Any] = {DESCRIPTION: description}
    if (allowed := Range(above, at_least, below, at_most)) != Range():
        metadata[RANGE] = allowed
    if isinstance(default, list):
        factory: Callable[[], Any] = default.copy
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yields each key's full name, such as ``train.lr``, with its field and value."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value
