"""Converts times in common notations to whole seconds since 1970 (UTC) and the nanoseconds beyond them.

A file's times are numbers (s, ms, us or ns since 1970, with or without a fraction), ISO 8601 text, or the timestamps and
dates of Parquet. `recognise` determines which from the first rows. `convert` then turns each batch into seconds, rounded
down, and nanoseconds from 0 to 999,999,999, so that no resolution is lost before events are sorted.

The unit of a number is recognised by its size: a time after 1973 has 9 or 10 digits in seconds and 3 more in each smaller unit. A
number that two units could explain, such as 30,000,000,000 (the year 2920 in seconds, 1970 in milliseconds), is rejected.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mme.data.parts import IntArray
from mme.errors import UserError
from mme.prepare.readers import SourceFile
from mme.prepare.values import as_integers, is_missing, is_number, is_text, mask, plain, trimmed

BoolArray = NDArray[np.bool_]

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
TIME_UNITS = ["auto", *PER_SECOND, "iso"]
BILLION = 10**9
LARGEST = str(2**63 - 1)
# Seconds reach 10^11 in the year 5138, and milliseconds reached it in 1973, so the size of a time shows its unit.
TOO_LATE_S = 10**11
TOO_EARLY_S = -11_644_473_600  # 1601-01-01, the zero of Windows' clock; 0001-01-01, the zero of .NET's, is below
MODERN_S = (10**8, 4_102_444_800)  # 1973 to 2100
DAY_S = 86_400

PLAIN_NUMBER = r"^(?P<sign>[+-]?)(?P<whole>\d{1,19})(?:\.(?P<part>\d*))?$"
EXPONENT = r"^[+-]?\d+\.?\d*[eE][+-]?\d{1,2}$"
_ZONE = r"\s?(?P<zone>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?"
_CLOCK = r"(?P<hour>\d{2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<part>\d+))?)?"
ISO = rf"^(?P<year>\d{{4}})[-/](?P<month>\d{{2}})[-/](?P<day>\d{{2}})(?:[Tt ]{_CLOCK}{_ZONE})?$"
_SHORT_CLOCK = r"(?P<hour>\d{2})(?P<minute>\d{2})(?:(?P<second>\d{2})(?:[.,](?P<part>\d+))?)?"
SHORT_ISO = rf"^(?P<year>\d{{4}})(?P<month>\d{{2}})(?P<day>\d{{2}})(?:[Tt ]?{_SHORT_CLOCK}{_ZONE})?$"
DAY_OR_MONTH_FIRST = r"^\d{1,2}[/.-]\d{1,2}[/.-]\d{2}(?:\d{2})?(?:\D|$)"
ENDS_WITH_ZONE = (
    r":\d{2}(?:[.,]\d+)?\s?(?:[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)$|[Tt]\d{4,6}(?:[.,]\d+)?(?:[Zz]|[+-]\d{2})"
)
EXPECTED_TIME = "expected a time: a number of s, ms, us or ns since 1970, or ISO 8601 such as 2021-04-03T12:30:00Z"


@dataclass(frozen=True)
class TimeForm:
    """How the times of one file are written.

    Attributes:
        kind: numbers, ISO 8601 text, or a timestamp or date type of Parquet.
        unit: unit of the numbers.
        by_size: whether the unit was recognised by size, so that a number with the size of another unit is malformed.
        zoned: whether the text of the first rows names a time zone; text without one is UTC.
        note: a remark for the description of the file.
    """

    kind: Literal["number", "text", "typed"]
    unit: str = "s"
    by_size: bool = False
    zoned: bool = False
    note: str = ""

    def __str__(self) -> str:
        if self.kind == "typed":
            return f"timestamps{self.note}"
        if self.kind == "text":
            return "ISO 8601" + ("" if self.zoned else ", without a time zone: taken as UTC")
        names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
        return f"{names[self.unit]} since 1970{self.note}"


@dataclass(frozen=True)
class Times:
    """
    Attributes:
        seconds: (rows,) int64, rounded down.
        nanoseconds: (rows,) int32, the rest of each time.
        faults: reason → the rows without a usable time.
    """

    seconds: pa.Array
    nanoseconds: NDArray[np.int32]
    faults: dict[str, pa.BooleanArray]


def recognise(source: SourceFile, column: pa.Array, said: str) -> TimeForm | None:
    """Determines how ``column``, the times of the first rows, is written; None if it has no value.

    ``said`` is the unit given by the user, or `auto`.

    Raises:
        UserError: the column holds no times, or two units are possible.
    """
    kind, column = column.type, plain(column)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        zoned = pa.types.is_timestamp(column.type) and column.type.tz is not None
        return TimeForm("typed", note="" if zoned or pa.types.is_date(column.type) else ", UTC")
    if not (is_text(column.type) or is_number(column.type)):
        raise UserError(f"{source.path}: column {source.columns['timestamp']!r} holds {kind}, {EXPECTED_TIME}")
    if pa.types.is_float32(column.type) and (pc.max(pc.abs(column)).as_py() or 0) >= 2**24:
        raise UserError(
            f"{source.path}: column {source.columns['timestamp']!r} holds {kind}, which rounds the seconds of 2020 to "
            "128: expected integers or float64"
        )
    present = column.filter(pc.invert(is_missing(column)))
    if not len(present):
        return None
    text = trimmed(present) if is_text(column.type) else None
    if said == "iso":
        zoned = text is not None and _share(pc.match_substring_regex(text, ENDS_WITH_ZONE)) > 0.5
        return TimeForm("text", zoned=zoned)
    if text is not None:
        is_numeric = pc.or_(pc.match_substring_regex(text, PLAIN_NUMBER), pc.match_substring_regex(text, EXPONENT))
        if 2 * (pc.sum(is_numeric).as_py() or 0) <= len(text):
            return _recognise_text(source, column, text)
        present = text.filter(is_numeric)
    return _recognise_unit(source, present.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), said)


def _recognise_text(source: SourceFile, column: pa.Array, text: pa.Array) -> TimeForm:
    zoned = _share(pc.match_substring_regex(text, ENDS_WITH_ZONE)) > 0.5
    form = TimeForm("text", zoned=zoned)
    _, _, valid, _ = _parse_text(text, allow_digits=False)
    if 2 * valid.sum() <= len(text):
        _refuse_day_or_month_first(source, column)
        first = text.filter(mask(~valid))[0].as_py()
        row = pc.index(trimmed(column), first).as_py()
        raise _no_time(source, row, first)
    return form


def _recognise_unit(source: SourceFile, numbers: NDArray[np.float64], said: str) -> TimeForm:
    name = source.columns["timestamp"]
    numbers = numbers[np.isfinite(numbers)]
    middle = float(np.median(np.abs(numbers))) if numbers.size else 0.0
    by_size = next((unit for unit, scale in PER_SECOND.items() if middle < TOO_LATE_S * scale), "ns")
    is_modern = MODERN_S[0] <= middle / PER_SECOND[by_size] <= MODERN_S[1]
    unit = said if said != "auto" else source.time_unit
    if unit is not None:
        too_fine = is_modern and middle / PER_SECOND[unit] < MODERN_S[0]
        if not too_fine:
            return TimeForm("number", unit)
        found = f"{middle:.0f} in the middle of the first rows is {_date(middle, unit)} in {unit}, {_date(middle, by_size)} in {by_size}"
        if said == "auto":
            raise UserError(f"{source.path}: column {name!r}: {found}: say which by --time-unit {unit} or {by_size}")
        return TimeForm("number", unit, note=f" (are they? {found})")
    if _are_dates(numbers):
        raise UserError(
            f"{source.path}: column {name!r}: {middle:.0f} in the middle of the first rows could be a date (YYYYMMDD) or a "
            f"number of {by_size} since 1970: say which by --time-unit iso or {by_size}"
        )
    if by_size != "ns" and middle / PER_SECOND[by_size] > MODERN_S[1]:
        finer = list(PER_SECOND)[list(PER_SECOND).index(by_size) + 1]
        raise UserError(
            f"{source.path}: column {name!r}: {middle:.0f} in the middle of the first rows is {_date(middle, by_size)} in "
            f"{by_size}, {_date(middle, finer)} in {finer}: say which by --time-unit {by_size} or {finer}"
        )
    return TimeForm("number", by_size, by_size=True)


def _date(number: float, unit: str) -> str:
    seconds = number / PER_SECOND[unit]
    try:
        day = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    except OverflowError:
        return "beyond the year 9999"
    return day.strftime("%Y-%m-%d")


def _are_dates(numbers: NDArray[np.float64]) -> bool:
    """Whether all of them look like YYYYMMDD, YYYYMMDDhhmm or YYYYMMDDhhmmss."""
    whole = numbers[(numbers == np.floor(numbers)) & (numbers > 0) & (numbers < 1e15)].astype(np.int64)
    if not whole.size or whole.size < numbers.size:
        return False
    days = np.where(whole >= 10**13, whole // 10**6, np.where(whole >= 10**11, whole // 10**4, whole))
    year, month, day = days // 10**4, days // 100 % 100, days % 100
    fits = (year >= 1900) & (year < 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    return bool(fits.all())


def convert(source: SourceFile, column: pa.Array, form: TimeForm) -> Times:
    """The times of a batch.

    Raises:
        UserError: a date whose day or month may come first, or a column whose type differs from that of the first rows.
    """
    column = plain(column)
    rows = len(column)
    missing = is_missing(column)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        seconds, nanoseconds = _of_type(column)
        return _checked(seconds, nanoseconds, missing, np.ones(rows, bool), {})
    more: dict[str, BoolArray] = {}
    if form.kind == "text":
        text = trimmed(column if is_text(column.type) else column.cast(pa.string()))
        seconds, nanoseconds, valid, zoned = _parse_text(text, allow_digits=form.by_size is False, zoned=form.zoned)
        if form.zoned:
            more["time without zone"] = valid & ~zoned
    else:
        whole, billionths, valid = _parse_numbers(column)
        seconds, nanoseconds = _in_seconds(whole, billionths, PER_SECOND[form.unit])
        more["negative time"] = valid & (seconds < 0) & (seconds >= -DAY_S)
        if form.by_size and form.unit != "s":
            more["time of another unit"] = valid & (np.abs(whole) < TOO_LATE_S * (PER_SECOND[form.unit] // 1000))
    if is_text(column.type) and not (valid | missing.to_numpy(zero_copy_only=False)).all():
        _refuse_day_or_month_first(source, column)
    return _checked(seconds, nanoseconds, missing, valid, more)


def _checked(
    seconds: IntArray, nanoseconds: IntArray, missing: pa.BooleanArray, valid: BoolArray, more: dict[str, BoolArray]
) -> Times:
    there = ~missing.to_numpy(zero_copy_only=False)
    faults = {
        "no value": missing,
        "not a time": mask(there & ~valid),
        **{reason: mask(there & rows) for reason, rows in more.items()},
        "time out of range": mask(there & valid & ((seconds >= TOO_LATE_S) | (seconds <= TOO_EARLY_S))),
    }
    return Times(pa.array(seconds), nanoseconds.astype(np.int32), faults)


def _of_type(column: pa.Array) -> tuple[IntArray, IntArray]:
    if pa.types.is_date32(column.type):
        days = column.cast(pa.int32()).fill_null(0).to_numpy().astype(np.int64)
        return days * DAY_S, np.zeros_like(days)
    unit = "ms" if pa.types.is_date64(column.type) else column.type.unit
    whole = column.cast(pa.int64()).fill_null(0).to_numpy()
    return _in_seconds(whole, None, PER_SECOND[unit])


def _in_seconds(whole: IntArray, billionths: IntArray | None, per_second: int) -> tuple[IntArray, IntArray]:
    """``whole`` + ``billionths`` · 10⁻⁹ of a unit → seconds, rounded down, and nanoseconds."""
    if per_second == 1:
        return whole, np.zeros_like(whole) if billionths is None else billionths
    seconds = whole // per_second
    nanoseconds = (whole - seconds * per_second) * (BILLION // per_second)
    if billionths is not None:
        nanoseconds += billionths // per_second
    return seconds, nanoseconds


def _parse_numbers(column: pa.Array) -> tuple[IntArray, IntArray | None, BoolArray]:
    """Whole units, rounded down; billionths of a unit, or None if all are 0; and whether the value is a number in range."""
    if pa.types.is_integer(column.type):
        valid = pc.is_valid(column)
        if column.type == pa.uint64():
            valid = pc.fill_null(pc.less(column, pa.scalar(2**63, pa.uint64())), False)
        numbers = pc.if_else(valid, column, pa.scalar(0, column.type)).cast(pa.int64())
        return numbers.to_numpy(), None, valid.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64()).fill_null(np.nan).to_numpy()
        fits = np.isfinite(numbers) & (np.abs(numbers) < 2.0**63)
        numbers = np.where(fits, numbers, 0.0)
        if (np.floor(numbers) == numbers).all():
            return numbers.astype(np.int64), None, fits
        # Floats are converted through their shortest text, so that .1 is one tenth, as in CSV.
        whole, billionths, valid = _parse_numbers(pa.array(numbers).cast(pa.string()))
        return whole, billionths, valid & fits
    text = trimmed(column)
    integers = as_integers(text)
    if integers is not None:
        return integers.fill_null(0).to_numpy(), None, np.ones(len(text), bool)
    fields = pc.extract_regex(text, PLAIN_NUMBER)
    digits = pc.struct_field(fields, "whole")
    too_large = pc.and_(pc.equal(pc.binary_length(digits), len(LARGEST)), pc.greater(digits, LARGEST))
    fields = pc.if_else(pc.fill_null(too_large, False), pa.scalar(None, fields.type), fields)
    valid = pc.is_valid(fields).to_numpy(zero_copy_only=False)
    whole, billionths = _integers(fields, "whole"), _integers(fields, "part", digits=9)
    negative = pc.fill_null(pc.equal(pc.struct_field(fields, "sign"), "-"), False).to_numpy(zero_copy_only=False)
    whole, billionths = _negated(whole, billionths, negative)
    for row in np.flatnonzero(pc.fill_null(pc.match_substring_regex(text, EXPONENT), False)).tolist():
        try:
            number = Decimal(text[row].as_py())
        except InvalidOperation:
            continue
        if number.adjusted() > 18:  # 10¹⁹ and more; a quotient of more than 28 digits raises InvalidOperation
            continue
        floor = int(number // 1) - (number < 0 and number % 1 != 0)
        if abs(floor) < 2**63:
            whole[row], billionths[row], valid[row] = floor, int((number - floor) * BILLION), True
    return whole, billionths, valid


def _negated(whole: IntArray, part: IntArray, negative: BoolArray) -> tuple[IntArray, IntArray]:
    """-(whole + part · 10⁻⁹) if ``negative``, with the part again between 0 and 10⁹ - 1."""
    has_part = part > 0
    flipped = -whole - has_part
    return np.where(negative, flipped, whole), np.where(negative & has_part, BILLION - part, part)


def _integers(fields: pa.StructArray, name: str, digits: int | None = None) -> IntArray:
    """The numbers of one group of a pattern, 0 where it did not match; ``digits``: the group is a fraction, scaled to so many digits."""
    text = pc.fill_null(pc.struct_field(fields, name), "")
    if digits is not None:
        text = pc.utf8_slice_codeunits(pc.utf8_rpad(text, digits, "0"), 0, digits)
    return pc.if_else(pc.equal(text, ""), "0", text).cast(pa.int64()).to_numpy().copy()


def _parse_text(
    text: pa.Array, allow_digits: bool, zoned: bool | None = None
) -> tuple[IntArray, IntArray, BoolArray, BoolArray]:
    """Parses ISO 8601 to seconds and nanoseconds, and tells whether the text is a valid time and whether it names a zone.

    ``allow_digits``: YYYYMMDD is accepted too. ``zoned`` is what the first rows had; a batch that agrees throughout is faster.
    """
    if zoned is not None:
        try:
            ticks = text.cast(pa.timestamp("ns", "UTC" if zoned else None)).cast(pa.int64())
            seconds, nanoseconds = _in_seconds(ticks.fill_null(0).to_numpy(), None, BILLION)
            return seconds, nanoseconds, np.ones(len(text), bool), np.full(len(text), zoned)
        except pa.ArrowInvalid:
            pass
    fields = pc.extract_regex(text, ISO)
    short = pc.extract_regex(text, SHORT_ISO)
    if not allow_digits:
        only_digits = pc.match_substring_regex(text, r"^\d*$")
        short = pc.if_else(pc.fill_null(only_digits, False), pa.scalar(None, short.type), short)
    fields = pc.if_else(pc.is_valid(fields), fields, short)
    number = {name: _integers(fields, name) for name in ("year", "month", "day", "hour", "minute", "second")}
    zone = pc.fill_null(pc.struct_field(fields, "zone"), "")
    digits = pc.replace_substring_regex(pc.replace_substring_regex(zone, r"^([Zz]|UTC|GMT)$", ""), "[+:-]", "")
    offset = pc.if_else(pc.equal(digits, ""), "0", pc.utf8_rpad(digits, 4, "0")).cast(pa.int64()).to_numpy()
    offset_s = offset // 100 * 3600 + offset % 100 * 60
    offset_s = np.where(pc.starts_with(zone, "-").to_numpy(zero_copy_only=False), -offset_s, offset_s)
    valid = pc.is_valid(fields).to_numpy(zero_copy_only=False) & _is_date(number) & (np.abs(offset_s) < DAY_S)
    seconds = _days(number["year"], number["month"], number["day"]) * DAY_S - offset_s
    seconds += number["hour"] * 3600 + number["minute"] * 60 + number["second"]
    has_zone = pc.not_equal(zone, "").to_numpy(zero_copy_only=False)
    return seconds, _integers(fields, "part", digits=9), valid, has_zone


def _is_date(number: dict[str, IntArray]) -> BoolArray:
    year, month, day = number["year"], number["month"], number["day"]
    lengths = np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
    leap = (month == 2) & (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    month_fits = (month >= 1) & (month <= 12)
    day_fits = (day >= 1) & (day <= lengths[np.where(month_fits, month, 0)] + leap)
    # 60: a leap second, which Unix time counts as the first of the next minute.
    clock_fits = (number["hour"] <= 23) & (number["minute"] <= 59) & (number["second"] <= 60)
    return month_fits & day_fits & clock_fits


def _days(year: IntArray, month: IntArray, day: IntArray) -> IntArray:
    """Days since 1970-01-01 in the Gregorian calendar (H. Hinnant, "chrono-compatible low-level date algorithms")."""
    year = year - (month <= 2)
    era = year // 400
    of_era = year - era * 400
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468


def _refuse_day_or_month_first(source: SourceFile, column: pa.Array) -> None:
    """Raises UserError for a value such as 03/04/2021."""
    found = pc.fill_null(pc.match_substring_regex(trimmed(column), DAY_OR_MONTH_FIRST), False)
    row = pc.index(found, True).as_py()
    if row >= 0:
        raise UserError(
            f"{source.path}: {source.place(row)}: column {source.columns['timestamp']!r} holds "
            f"{column[row].as_py()!r}: day or month may come first; expected ISO 8601, such as 2021-04-03"
        )


def _no_time(source: SourceFile, row: int, value: str) -> UserError:
    place = source.place(row)
    return UserError(
        f"{source.path}: {place}: column {source.columns['timestamp']!r} holds {value[:60]!r}, {EXPECTED_TIME}"
    )


def _share(rows: pa.BooleanArray) -> float:
    return (pc.sum(rows).as_py() or 0) / max(len(rows), 1)
