"""Converts Arrow columns to plain ones (text, whole numbers, floats, times), which are the same for every file format."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

BLANKS = " \t\r\n\f\v"
REPLACEMENT = "\ufffd"  # replaces bytes that are not UTF-8


def plain(column: pa.Array) -> pa.Array:
    """``column`` without dictionary or extension type; text, binary and decimals as `string`, float16 as float32.

    Bytes that are not UTF-8 become U+FFFD.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_dictionary(kind):
        return plain(column.dictionary_decode())
    if pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_decimal(kind):
        if kind.scale < 0:  # written with an exponent otherwise
            column = column.cast(pa.decimal256(76, 0))
        return column.cast(pa.string())
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    if _is_string(kind) or _is_binary(kind):
        return _as_string(column)
    return column


def is_text(kind: pa.DataType) -> bool:
    """Whether the type of a `plain` column is text."""
    return pa.types.is_string(kind)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def is_missing(column: pa.Array) -> pa.BooleanArray:
    """The rows of a `plain` column that are null, NaN or an empty text."""
    if is_text(column.type):
        return pc.or_(pc.is_null(column), pc.fill_null(pc.equal(column, ""), False))
    return pc.is_null(column, nan_is_null=True)


def trimmed(text: pa.Array) -> pa.Array:
    """``text`` without the blanks around each value."""
    first_or_last_blank = pc.match_substring_regex(text, r"^\s|\s$")
    return pc.utf8_trim(text, BLANKS) if pc.any(first_or_last_blank).as_py() else text


def as_integers(text: pa.Array) -> pa.Array | None:
    """int64 values of a text column of plain digits, the most common case, which is much faster than a pattern.

    None if some value has a leading zero, a sign, more than 19 digits, or is not a number below 2^63.
    """
    length = pc.binary_length(text)
    odd = pc.or_(pc.and_(pc.starts_with(text, "0"), pc.greater(length, 1)), pc.starts_with(text, "-"))
    if pc.any(pc.or_(odd, pc.greater(length, 19))).as_py():
        return None
    try:
        return text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None


def mask(values: NDArray[np.bool_]) -> pa.BooleanArray:
    return pa.array(values, pa.bool_())


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _as_string(column: pa.Array) -> pa.Array:
    try:
        text = column.cast(pa.string())
        text.validate(full=True)  # Parquet files are not validated when they are read
        return text
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        return pa.array([None if v is None else v.decode("utf-8", "replace") for v in values], pa.string())
