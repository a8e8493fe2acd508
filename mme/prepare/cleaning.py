"""Turns raw columns into ids, times and features. Rows that are malformed or lack the required feedback are counted by reason."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mme.data.features import Vocabulary, parts_column
from mme.errors import UserError
from mme.prepare.feedback import FeedbackFilter, feedback_numbers
from mme.prepare.ids import IdColumn, convert_ids, settle_kind
from mme.prepare.malformed import EXAMPLES, Malformed
from mme.prepare.readers import ROLES, SourceFile
from mme.prepare.times import convert, recognise

ID_ROLES = ("user", "item")


class Cleaner:
    """Cleans the batches of all files.

    Attributes:
        ids: what is known about the ids, by role (user, item).
        malformed: the rows that are left out because they are malformed.
        unwanted: valid rows that are left out because of their feedback, by reason.
        vocabularies: feature column → its vocabulary, which learns the values of sound rows.
    """

    def __init__(
        self,
        feedback: FeedbackFilter | None = None,
        ids: dict[str, IdColumn] | None = None,
        vocabularies: dict[str, Vocabulary] | None = None,
        time_unit: str = "auto",
    ) -> None:
        self.malformed = Malformed()
        self.unwanted: Counter[str] = Counter()
        self.ids = ids or {role: IdColumn() for role in ID_ROLES}
        self.vocabularies = vocabularies or {}
        self._feedback = feedback or FeedbackFilter()
        self._time_unit = time_unit

    def examine(self, source: SourceFile, sample: pa.RecordBatch) -> None:
        """Determines from the first rows of a file how its times are written and whether its ids are numbers or text.

        Raises:
            UserError: a column can't be ids or times, or its ids don't fit those of earlier files.
        """
        if source.time_form is None:
            source.time_form = recognise(source, sample.column("timestamp"), self._time_unit)
        for role in ID_ROLES:
            settle_kind(source, role, sample.column(role), self.ids[role])

    def clean(self, source: SourceFile, batch: pa.RecordBatch, first_row: int) -> pa.Table:
        """The valid rows of a batch: user, item, timestamp (seconds), fraction (nanoseconds), position and features.

        The position is the number of the row in the file; that of the batch's first row is ``first_row``.

        Raises:
            UserError: a column has a type that ids or times can't have.
        """
        if source.time_form is None or any(ids.kind is None for ids in self.ids.values()):
            self.examine(source, batch)  # the sample had no value
        columns: dict[str, pa.Array] = {}
        sound = pa.array(np.ones(batch.num_rows, bool))
        for role in ROLES:
            column = batch.column(role)
            if role != "timestamp":
                columns[role], reasons = convert_ids(source, role, column, self.ids[role])
            elif source.time_form is None:
                columns[role] = pa.array(np.zeros(batch.num_rows, np.int64))
                columns["fraction"] = pa.array(np.zeros(batch.num_rows, np.int32))
                reasons = {"no value": sound}
            else:
                times = convert(source, column, source.time_form)
                columns[role], columns["fraction"], reasons = times.seconds, pa.array(times.nanoseconds), times.faults
            if (
                role == "timestamp" and source.times_may_be_missing
            ):  # published files have such rows, so they are not malformed
                missing = pc.and_(reasons.pop("no value"), sound)
                self._leave_out("no time", missing)
                sound = pc.and_not(sound, missing)
            for reason, bad in reasons.items():
                bad = pc.and_(bad, sound)  # a row counts only once, under its first fault
                self._count(source, f"{reason} in {source.columns[role]}", bad, column)
                sound = pc.and_not(sound, bad)
        sound = self._wanted(source, batch, sound)
        position = pa.array(np.arange(first_row, first_row + batch.num_rows))
        return self._with_features(source, batch, pa.table({**columns, "position": position}).filter(sound), sound)

    def _with_features(
        self, source: SourceFile, batch: pa.RecordBatch, table: pa.Table, sound: pa.BooleanArray
    ) -> pa.Table:
        """Adds the value indices of each feature to ``table``."""
        for name, vocabulary in self.vocabularies.items():
            column = parts_column(name)
            try:
                numbers = vocabulary.learn(batch.column(column).filter(sound))
            except (TypeError, OverflowError) as error:
                raise UserError(f"{source.path}: column {name!r} {error}") from error
            table = table.append_column(column, pa.array(numbers))
        return table

    def _wanted(self, source: SourceFile, batch: pa.RecordBatch, sound: pa.BooleanArray) -> pa.BooleanArray:
        """The ``sound`` rows that have the required feedback."""
        for role in self._feedback.roles():
            name = source.columns[role]
            numbers = feedback_numbers(batch.column(role))
            if numbers is None:
                raise UserError(f"{source.path}: column {name!r} holds {batch.column(role).type}, expected numbers")
            missing = pc.and_(pc.is_null(numbers), sound)
            self._count(source, f"no number in {name}", missing, batch.column(role))
            sound = pc.and_not(sound, missing)
            milliseconds = name.endswith("_ms") or source.times_may_be_missing  # KuaiRec: play_duration in milliseconds
            reason, fails = self._feedback.fails(role, numbers.fill_null(0.0), milliseconds)
            fails = pc.and_(fails, sound)
            self._leave_out(reason, fails)
            sound = pc.and_not(sound, fails)
        return sound

    def _leave_out(self, reason: str, rows: pa.BooleanArray) -> None:
        number = pc.sum(rows).as_py() or 0
        if number:
            self.unwanted[reason] += number

    def _count(self, source: SourceFile, reason: str, bad: pa.BooleanArray, column: pa.Array) -> None:
        number = pc.sum(bad).as_py() or 0
        if number:
            rows = pc.indices_nonzero(bad)[:EXAMPLES].to_pylist()
            examples = []
            for row in rows:
                value = column[row].as_py()
                shown = "" if value is None else f": {str(value)[:40]!r}"
                examples.append(f"{source.path.name} {source.place(row)}{shown}")
            self.malformed.add(reason, number, examples)
