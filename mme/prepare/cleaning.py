"""Raw columns → whole numbers or text, with the rows that are malformed or lack the feedback wanted counted by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mme.data.features import Vocabulary, parts_column
from mme.errors import UserError
from mme.prepare.feedback import FeedbackFilter, feedback_numbers
from mme.prepare.formats import ROLES
from mme.prepare.readers import SourceFile

EXAMPLES = 3
WHOLE_NUMBER = r"^-?(0|[1-9]\d{0,18})(\.0+)?$"
LARGEST = str(2**63 - 1)
FRACTION = r"^\d{1,15}(\.\d*)?$"
# Seconds reach 1e11 in the year 5138, milliseconds did in 1973: the size of a time tells its unit.
LARGEST_TIME_S = 10**11
TIME_UNITS = [1, 10**3, 10**6]


@dataclass
class Malformed:
    """How many rows were left out, why, and of the first few where they stand and what stands there."""

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
        return {reason: {"rows": number, "first": self.examples[reason]} for reason, number in self.counts.items()}

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {number} (first: {self.examples[reason][0]})" for reason, number in self.counts.items()
        )


class Cleaner:
    """Cleans batch after batch; the first one with rows says whether ids are numbers or text.

    Ids are numbers where most of the first batch's are whole numbers (a type does not change because of a few bad
    rows); all else in such a column is malformed. Negative numbers are no ids. Times must be whole numbers of seconds
    or of a smaller unit, which the middle one of a file's first batch tells by its size.

    Attributes:
        malformed: the rows left out because something is wrong with them.
        unwanted: sound rows left out because of their feedback, by reason.
        vocabularies: of the features, by column; they learn the values of sound rows.
    """

    def __init__(
        self,
        feedback: FeedbackFilter | None = None,
        id_types: dict[str, pa.DataType] | None = None,
        vocabularies: dict[str, Vocabulary] | None = None,
    ) -> None:
        self.malformed = Malformed()
        self.unwanted: Counter[str] = Counter()
        self.id_types = dict(id_types or {})
        self.vocabularies = vocabularies or {}
        self._feedback = feedback or FeedbackFilter()

    def clean(self, source: SourceFile, batch: pa.RecordBatch, first_row: int) -> pa.Table:
        """The sound rows of a batch: user, item, timestamp (seconds), position, its row from ``first_row`` on, and features.

        Raises:
            UserError: a column has another type than ids or times can have.
        """
        columns: dict[str, pa.Array] = {}
        sound = pa.array([True] * batch.num_rows)
        for role in ROLES:
            column = batch.column(role)
            if role == "timestamp":
                values, reasons = self._times(source, column)
                if source.loose_times:  # published without: nothing is wrong with the file
                    missing = pc.and_(reasons.pop("no value"), sound)
                    self._leave_out("no time", missing)
                    sound = pc.and_not(sound, missing)
            else:
                values, reasons = self._ids(source, role, column)
            for reason, bad in reasons.items():
                bad = pc.and_(bad, sound)  # a row counts once, under its first fault
                self._count(source, f"{reason} in {source.columns[role]}", bad, column)
                sound = pc.and_not(sound, bad)
            columns[role] = values
        sound = self._wanted(source, batch, sound)
        position = pa.array(np.arange(first_row, first_row + batch.num_rows))
        return self._with_features(source, batch, pa.table({**columns, "position": position}).filter(sound), sound)

    def _with_features(
        self, source: SourceFile, batch: pa.RecordBatch, table: pa.Table, sound: pa.BooleanArray
    ) -> pa.Table:
        """``table`` with the numbers of each feature's values."""
        for name, vocabulary in self.vocabularies.items():
            column = parts_column(name)
            try:
                numbers = vocabulary.learn(batch.column(column).filter(sound))
            except (TypeError, OverflowError) as error:
                raise UserError(f"{source.path}: column {name!r} {error}") from error
            table = table.append_column(column, pa.array(numbers))
        return table

    def _wanted(self, source: SourceFile, batch: pa.RecordBatch, sound: pa.BooleanArray) -> pa.BooleanArray:
        """Which of the ``sound`` rows have the feedback asked for."""
        for role in self._feedback.roles():
            name = source.columns[role]
            numbers = feedback_numbers(batch.column(role))
            if numbers is None:
                raise UserError(f"{source.path}: column {name!r} holds {batch.column(role).type}, expected numbers")
            missing = pc.and_(pc.is_null(numbers), sound)
            self._count(source, f"no number in {name}", missing, batch.column(role))
            sound = pc.and_not(sound, missing)
            milliseconds = name.endswith("_ms") or source.loose_times  # KuaiRec: play_duration in milliseconds
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
                examples.append(f"{source.path.name} {source.place(source.rows_read + row)}{shown}")
            self.malformed.add(reason, number, examples)

    def _ids(self, source: SourceFile, role: str, column: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not (_is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise UserError(
                f"{source.path}: column {source.columns[role]!r} holds {column.type}, expected ids (integer or text)"
            )
        kind = self.id_types.get(role)
        numbers, faults = (None, None) if source.text_ids or kind == pa.string() else _whole_numbers(column)
        if kind is None:
            kind = pa.int64()
            if numbers is None or (_is_text(column.type) and 2 * numbers.null_count > len(column) + column.null_count):
                kind = pa.string()
            if len(column):
                self.id_types[role] = kind
        if kind == pa.string():
            if not _is_text(column.type):
                raise UserError(
                    f"{source.path}: column {source.columns[role]!r} holds {column.type}, the files before it hold text"
                )
            text = column.cast(pa.string())
            return text, {"no id": _is_missing(column)}
        if numbers is None or faults is None:
            raise UserError(f"{source.path}: column {source.columns[role]!r} holds text, the files before it numbers")
        return numbers, {**faults, "negative id": pc.fill_null(pc.less(numbers, 0), False)}

    def _times(self, source: SourceFile, column: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
        name = source.columns["timestamp"]
        if pa.types.is_timestamp(column.type):
            seconds = column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
            return seconds, {"no value": pc.is_null(column), **_time_faults(seconds)}
        if not (_is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise UserError(f"{source.path}: column {name!r} holds {column.type}, expected integer seconds")
        numbers, faults = _whole_numbers(_rounded_down(column) if source.loose_times else column)
        if _is_text(column.type) and 2 * numbers.null_count > len(column) + column.null_count:
            first = pc.and_(pc.is_valid(column), pc.is_null(numbers))
            row = pc.index(first, True).as_py()
            raise UserError(
                f"{source.path}: {source.place(source.rows_read + row)}: column {name!r} holds {column[row].as_py()!r}, "
                "expected integer seconds"
            )
        if source.time_unit is None and len(numbers) > numbers.null_count:
            source.time_unit = _time_unit(numbers.drop_null().to_numpy())
        numbers = pc.if_else(
            pc.is_valid(numbers), pa.array(numbers.fill_null(0).to_numpy() // (source.time_unit or 1)), None
        )
        return numbers, faults | _time_faults(numbers)


def _time_unit(times: NDArray[np.int64]) -> int:
    """How many of the unit of ``times`` make a second."""
    middle = int(np.median(np.abs(times)))
    return next((unit for unit in TIME_UNITS if middle < LARGEST_TIME_S * unit), TIME_UNITS[-1])


def _time_faults(seconds: pa.Array) -> dict[str, pa.Array]:
    return {
        "negative time": pc.fill_null(pc.less(seconds, 0), False),
        "time out of range": pc.fill_null(pc.greater_equal(seconds, LARGEST_TIME_S), False),
    }


def _whole_numbers(column: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
    """(int64 with null where there is no whole number, fault → mask of the rows that have it)."""
    missing = _is_missing(column)
    if pa.types.is_integer(column.type):
        fits = (
            pc.fill_null(pc.less_equal(column, 2**63 - 1), False) if column.type == pa.uint64() else pc.is_valid(column)
        )
        numbers = pc.if_else(fits, column, None).cast(pa.int64())
    elif pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        # Beyond 2^53 a float is no longer exact: two ids could become one.
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
        numbers = pc.if_else(pc.fill_null(whole, False), column, None).cast(pa.int64())
    else:
        numbers = _plain_numbers(column)
        if numbers is not None:
            return numbers, {"no value": missing}
        text = pc.utf8_trim_whitespace(column)
        whole = pc.fill_null(pc.match_substring_regex(text, WHOLE_NUMBER), False)
        digits = pc.replace_substring_regex(pc.if_else(whole, text, None), r"\.0+$", "")
        size = pc.utf8_ltrim(digits, "-")
        fits = pc.or_(pc.less(pc.binary_length(size), len(LARGEST)), pc.less_equal(size, LARGEST))
        numbers = pc.if_else(fits, digits, None).cast(pa.int64())
    return numbers, {"no value": missing, "not a whole number": pc.and_not(pc.is_null(numbers), missing)}


def _plain_numbers(text: pa.Array) -> pa.Array | None:
    """int64 of a column that holds nothing but plain digits, as nearly all do: much faster than the rule's pattern."""
    length = pc.binary_length(text)
    odd = pc.or_(pc.and_(pc.starts_with(text, "0"), pc.greater(length, 1)), pc.starts_with(text, "-"))
    if pc.any(pc.or_(odd, pc.greater(length, 18))).as_py():
        return None
    try:
        return text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None


def _rounded_down(column: pa.Array) -> pa.Array:
    """Times with fractions of a second → whole seconds; what is no number stays."""
    if pa.types.is_floating(column.type):
        return pc.floor(column)
    if not _is_text(column.type):
        return column
    text = pc.utf8_trim_whitespace(column)
    is_number = pc.fill_null(pc.match_substring_regex(text, FRACTION), False)
    return pc.if_else(is_number, pc.replace_substring_regex(text, r"\..*$", ""), text)


def _is_missing(column: pa.Array) -> pa.Array:
    if _is_text(column.type):
        return pc.or_(pc.is_null(column), pc.fill_null(pc.equal(column, ""), False))
    return pc.is_null(column, nan_is_null=True)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
