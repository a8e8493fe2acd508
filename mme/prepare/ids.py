"""The rule for user and item ids, which is the same in every file format.

Ids are 64-bit whole numbers (signed or unsigned) if most of the first rows hold such numbers and none is written with a
leading zero; otherwise they are text. `--id-type` overrides this. 7, "7" and 7.0 are the same number; as texts, "7" and
"007" are two ids. Blanks around an id are ignored.

Numbers are kept as int64. Those from 2^63 on wrap around until all rows are read, because only then is it known whether a
column is unsigned (`IdColumn.unsigned`). No column may have both such numbers and negative ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mme.errors import UserError
from mme.prepare.readers import SourceFile
from mme.prepare.values import REPLACEMENT, as_integers, is_missing, is_number, is_text, plain, trimmed

ID_TYPES = ["auto", "integer", "text"]
WHOLE_NUMBER = r"^(0|-?[1-9]\d{0,19})(\.0*)?$"
LEADING_ZERO = r"^-?0\d+$"
LEADING_ZEROS = r"^(-?)0+(\d)"
LARGEST, LARGEST_UNSIGNED, SMALLEST = str(2**63 - 1), str(2**64 - 1), str(2**63)

IdKind = Literal["integer", "text"]


@dataclass
class IdColumn:
    """What is known about the user ids or the item ids of a whole data set.

    Attributes:
        kind: None before the first row with an id.
        fixed: events are added to a set, so `kind` and `unsigned` can't change.
        said: the value of --id-type. With `text`, numbers become text; with `integer`, leading zeros are ignored.
        negative, large: whether a number below 0, or from 2^63 on, has been seen.
    """

    kind: IdKind | None = None
    fixed: bool = False
    said: str = "auto"
    negative: bool = False
    large: bool = False

    @property
    def unsigned(self) -> bool:
        return self.kind == "integer" and self.large

    @property
    def arrow_type(self) -> pa.DataType:
        if self.kind == "text":
            return pa.string()
        return pa.uint64() if self.unsigned else pa.int64()


def as_bits(ids: pa.Array) -> pa.Array:
    """Unsigned ids wrapped to int64, all others as they are."""
    return ids.view(pa.int64()) if ids.type == pa.uint64() else ids


def from_bits(ids: pa.Array, unsigned: bool) -> pa.Array:
    """The inverse of `as_bits`."""
    return ids.view(pa.uint64()) if unsigned else ids


def natural_kind(source: SourceFile, role: str, column: pa.Array, as_text: bool) -> IdKind | None:
    """The kind of the ids of the first rows by the rule, or text if ``as_text``; None if there is no id.

    Raises:
        UserError: the column can't hold ids.
    """
    kind, column = column.type, plain(column)
    if not (is_text(column.type) or is_number(column.type)):
        raise UserError(f"{source.path}: column {source.columns[role]!r} holds {kind}, expected ids (integer or text)")
    present = column.filter(pc.invert(is_missing(column)))
    if not len(present):
        return None
    if as_text:
        return "text"
    if is_number(column.type):
        return "integer"
    text = trimmed(present)
    if as_integers(text) is not None:
        return "integer"
    if pc.any(pc.match_substring_regex(text, LEADING_ZERO)).as_py():
        return "text"
    numbers = pc.sum(pc.match_substring_regex(text, WHOLE_NUMBER)).as_py()
    return "integer" if 2 * numbers > len(text) else "text"


def settle_kind(source: SourceFile, role: str, column: pa.Array, ids: IdColumn) -> None:
    """Sets ``ids.kind`` by the first rows of a file, or checks that they fit it.

    Raises:
        UserError: the ids of this file are of another kind.
    """
    # A set with integer ids keeps them, whatever the option says.
    as_text = source.text_ids and not ids.fixed
    kind = natural_kind(source, role, column, as_text)
    if kind == "text" and ids.said == "integer" and ids.kind == "integer":
        kind = natural_kind(source, role, _without_leading_zeros(plain(column)), as_text)
    if kind is None:
        return
    if ids.kind is None:
        ids.kind = kind
        return
    name, values = source.columns[role], plain(column)
    row = pc.index(is_missing(values), False).as_py()
    found = f"{source.path}: column {name!r} holds {column.type} ({str(values[row].as_py())[:40]!r})"
    others = f"the {role} ids of the training set" if ids.fixed else "those before it"
    if ids.kind == "integer" and kind == "text":
        if ids.said == "integer" and not ids.fixed:
            raise UserError(f"{found}, --id-type integer asks for whole numbers")
        raise UserError(f"{found}, {others} are integers: prepare all files with --id-type text")
    if ids.kind == "text" and is_number(values.type) and ids.said != "text":
        raise UserError(f"{found}, {others} are text: give --id-type text to take these numbers as text")


def convert_ids(
    source: SourceFile, role: str, column: pa.Array, ids: IdColumn
) -> tuple[pa.Array, dict[str, pa.BooleanArray]]:
    """The ids of a batch (int64 or text, see the module) and, by reason, the rows without a usable one."""
    is_decimal = pa.types.is_decimal(column.type)
    column = plain(column)
    if ids.said == "integer" and is_text(column.type):
        column = _without_leading_zeros(column)
    missing = is_missing(column)
    if ids.kind == "text":
        text = _as_text(column)
        if is_decimal:
            text = pc.replace_substring_regex(text, r"\.0+$", "")
        # Bytes were lost, so two ids may have become equal.
        damaged = pc.fill_null(pc.match_substring(text, REPLACEMENT), False)
        return text, {"no value": pc.or_(missing, is_missing(text)), "not UTF-8": damaged}
    numbers = _as_numbers(column)
    faults = {"no value": missing, "not a whole number": pc.and_not(pc.is_null(numbers.signed), missing)}
    if ids.fixed and not ids.large:
        faults["id above 2^63 - 1"] = numbers.large
    elif ids.fixed:
        faults["negative id"] = numbers.negative
    else:
        ids.large |= bool(pc.any(numbers.large).as_py())
        ids.negative |= bool(pc.any(numbers.negative).as_py())
    if ids.large and ids.negative:
        row = pc.index(pc.or_(numbers.large, numbers.negative), True).as_py()
        raise UserError(
            f"{source.path}: {source.place(row)}: column {source.columns[role]!r} holds "
            f"{column[row].as_py()}: no 64-bit type has both negative ids and ids above 2^63 - 1; give --id-type text"
        )
    return numbers.signed, faults


@dataclass(frozen=True)
class _Numbers:
    """Values as ``signed`` int64, null if not a 64-bit whole number; which are ``negative``, and which ``large`` (wrapped)."""

    signed: pa.Array
    negative: pa.BooleanArray
    large: pa.BooleanArray


def _as_numbers(column: pa.Array) -> _Numbers:
    if pa.types.is_floating(column.type):
        # Beyond this, floats are not exact, and two ids could become equal.
        exact = 2.0**24 if pa.types.is_float32(column.type) else 2.0**53
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less_equal(pc.abs(column), exact))
        column = pc.if_else(pc.fill_null(whole, False), column, pa.scalar(None, column.type)).cast(pa.int64())
    if is_text(column.type):
        text = trimmed(column)
        integers = as_integers(text)
        if integers is None:
            return _parse(text)
        return _signed(integers, might_be_negative=False)
    if column.type == pa.uint64():
        return _unsigned(column)
    return _signed(column.cast(pa.int64()))


def _without_leading_zeros(text: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(trimmed(text), LEADING_ZEROS, r"\1\2")


def _signed(numbers: pa.Array, might_be_negative: bool = True) -> _Numbers:
    none = pa.array(np.zeros(len(numbers), bool))
    return _Numbers(numbers, pc.fill_null(pc.less(numbers, 0), False) if might_be_negative else none, none)


def _unsigned(numbers: pa.Array) -> _Numbers:
    large = pc.fill_null(pc.greater_equal(numbers, pa.scalar(2**63, pa.uint64())), False)
    none = pa.array(np.zeros(len(numbers), bool))
    return _Numbers(numbers.view(pa.int64()), none, large)


def _parse(text: pa.Array) -> _Numbers:
    """Parses by pattern; a value that does not fit into 64 bits is not a number."""
    whole = pc.fill_null(pc.match_substring_regex(text, WHOLE_NUMBER), False)
    digits = pc.replace_substring_regex(pc.if_else(whole, text, pa.scalar(None, text.type)), r"\.0*$", "")
    negative = pc.fill_null(pc.starts_with(digits, "-"), False)
    size = pc.utf8_ltrim(digits, "-")
    length = pc.binary_length(size)

    def up_to(limit: str) -> pa.BooleanArray:
        shorter, equal = pc.less(length, len(limit)), pc.equal(length, len(limit))
        return pc.fill_null(pc.or_(shorter, pc.and_(equal, pc.less_equal(size, limit))), False)

    null = pa.scalar(None, text.type)
    fits_signed = pc.if_else(negative, up_to(SMALLEST), up_to(LARGEST))
    large = pc.and_not(pc.and_not(up_to(LARGEST_UNSIGNED), up_to(LARGEST)), negative)
    signed = pc.if_else(fits_signed, digits, null).cast(pa.int64())
    wrapped = pc.if_else(large, digits, null).cast(pa.uint64()).view(pa.int64())
    return _Numbers(pc.coalesce(signed, wrapped), pc.and_(negative, fits_signed), large)


def _as_text(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        exact = 2.0**24 if pa.types.is_float32(column.type) else 2.0**53
        whole = pc.fill_null(pc.and_(pc.equal(pc.floor(column), column), pc.less_equal(pc.abs(column), exact)), False)
        integers = pc.if_else(whole, column, pa.scalar(None, column.type)).cast(pa.int64())
        return pc.coalesce(integers.cast(pa.string()), column.cast(pa.string()))
    return trimmed(column.cast(pa.string()))
