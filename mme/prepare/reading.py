"""Reads and cleans the files of one run, and counts what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mme.data.features import KINDS
from mme.errors import UserError
from mme.prepare.cleaning import Cleaner
from mme.prepare.malformed import Malformed
from mme.prepare.readers import SourceFile


@dataclass
class Reading:
    """Reads and cleans the files, one after another."""

    sources: list[SourceFile]
    cleaner: Cleaner
    max_malformed_share: float
    rows: int = 0
    sound: int = 0

    def examine(self) -> None:
        """Determines from the first rows of each file how its times and ids are written.

        Raises:
            UserError: a column can't be ids or times, or its ids don't fit those of earlier files.
        """
        for source in self.sources:
            sample = source.sample()
            if sample is not None:
                self.cleaner.examine(source, sample)

    def tables(self) -> Iterator[pa.Table]:
        for source in self.sources:
            for batch in source.batches():
                table = self.cleaner.clean(source, batch, self.rows)
                self.rows += batch.num_rows
                self.sound += table.num_rows
                if table.num_rows:
                    yield table
            places = [f"{source.path.name} line {line}" for line in source.broken_lines]
            reason = "not a JSON object with each key once" if source.kind == "json" else "wrong number of fields"
            self.cleaner.malformed.add(reason, source.broken_rows, places)
            self.rows += source.broken_rows
            if source.rows_read + source.broken_rows == 0:
                raise UserError(f"{source.path}: no rows: expected one interaction per row")

    def state(self) -> dict[str, Any]:
        """The results of reading, for `restore`; called when all files have been read."""
        cleaner = self.cleaner
        return {
            "rows": self.rows,
            "sound": self.sound,
            "malformed": {"counts": cleaner.malformed.counts, "examples": cleaner.malformed.examples},
            "unwanted": cleaner.unwanted,
            "ids": {role: [ids.kind, ids.negative, ids.large] for role, ids in cleaner.ids.items()},
            "vocabularies": {name: list(vocabulary.numbers) for name, vocabulary in cleaner.vocabularies.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over the `state` of an interrupted run."""
        cleaner = self.cleaner
        self.rows, self.sound = state["rows"], state["sound"]
        cleaner.malformed = Malformed(Counter(state["malformed"]["counts"]), state["malformed"]["examples"])
        cleaner.unwanted = Counter(state["unwanted"])
        for role, (kind, negative, large) in state["ids"].items():
            ids = cleaner.ids[role]
            ids.kind, ids.negative, ids.large = kind, negative, large
        for name, values in state["vocabularies"].items():
            cleaner.vocabularies[name] = KINDS[cleaner.vocabularies[name].kind](values)

    def check(self) -> None:
        """Raises UserError if too large a share of the rows is malformed."""
        bad = self.cleaner.malformed
        if not self.sound and self.cleaner.unwanted:
            reasons = "; ".join(f"{reason}: {number:,}" for reason, number in self.cleaner.unwanted.items())
            raise UserError(f"{self.names()}: no row of {self.rows:,} has the feedback asked for ({reasons})")
        if bad.total > self.max_malformed_share * self.rows or not self.sound:
            raise UserError(
                f"{self.names()}: {bad.total:,} of {self.rows:,} rows are malformed, more than the share "
                f"{self.max_malformed_share:g} allowed by --max-malformed-share: {bad}{self._advice()}"
            )

    def _advice(self) -> str:
        """The options that may help with the reasons found."""
        reasons = " ".join(self.cleaner.malformed.counts)
        advice = ""
        if "not a whole number" in reasons:
            advice += "; --id-type text takes all ids as text"
        if "another unit" in reasons:
            advice += "; --time-unit says the unit of times"
        if "wrong number of fields" in reasons:
            advice += "; --quoting says what quotes mean"
        return advice

    def names(self) -> str:
        """The paths of the first few files, for messages."""
        paths = [str(source.path) for source in self.sources]
        return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more files" if len(paths) > 3 else "")

    def report(self) -> dict[str, Any]:
        bad = self.cleaner.malformed
        return {
            "rows_read": self.rows,
            "malformed_rows": bad.total,
            "malformed": bad.report(),
            "unwanted_rows": sum(self.cleaner.unwanted.values()),
            "unwanted": dict(self.cleaner.unwanted),
        }
