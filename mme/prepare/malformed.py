"""Counts malformed rows by reason and remembers where the first ones are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 3


@dataclass
class Malformed:
    """
    Attributes:
        counts: rows by reason.
        examples: reason → the places and values of the first `EXAMPLES` rows.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, reason: str, number: int, places: list[str]) -> None:
        if number:
            self.counts[reason] += number
            kept = self.examples.setdefault(reason, [])
            kept.extend(places[: EXAMPLES - len(kept)])

    def report(self) -> dict[str, dict[str, object]]:
        """The counts and examples for dataset.json."""
        return {reason: {"rows": number, "first": self.examples[reason]} for reason, number in self.counts.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {number} (first: {self.examples[reason][0]})" for reason, number in self.counts.items()
        )
