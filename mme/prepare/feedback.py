"""Selects interactions by the feedback of the user: rating, click, watch time."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
TRUE_TEXTS, FALSE_TEXTS = ["true", "t", "yes"], ["false", "f", "no"]


@dataclass(frozen=True)
class FeedbackFilter:
    """Conditions that every event must meet; None and False mean no condition.

    Attributes:
        min_rating: the least rating.
        clicks_only: whether the click must be 1 or true.
        min_watch_s: the least watch time, in seconds.
        min_watch_ratio: the least watched share of the video, which is above 1 if it was watched again.
    """

    min_rating: float | None = None
    clicks_only: bool | None = None
    min_watch_s: float | None = None
    min_watch_ratio: float | None = None

    def roles(self) -> list[str]:
        """The roles of the columns that the conditions need."""
        asked = {
            "rating": self.min_rating is not None,
            "click": bool(self.clicks_only),
            "watch_time": self.min_watch_s is not None,
            "watch_ratio": self.min_watch_ratio is not None,
        }
        return [role for role, wanted in asked.items() if wanted]

    def fails(self, role: str, values: pa.Array, milliseconds: bool) -> tuple[str, pa.Array]:
        """A name for the rows that fail, and which rows do; ``values`` are numbers."""
        if role == "rating":
            return f"rating below {self.min_rating:g}", pc.less(values, float(self.min_rating or 0))
        if role == "click":
            return "not clicked", pc.less_equal(values, 0.0)
        if role == "watch_time":
            least = float(self.min_watch_s or 0) * (1000 if milliseconds else 1)
            return f"watched less than {self.min_watch_s:g} s", pc.less(values, least)
        return f"watch ratio below {self.min_watch_ratio:g}", pc.less(values, float(self.min_watch_ratio or 0))


def feedback_numbers(column: pa.Array) -> pa.Array | None:
    """The values as float64, null if missing or not a number; None if the column can't be feedback."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_boolean(kind):
        return column.cast(pa.int8()).cast(pa.float64())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = column.cast(pa.float64(), safe=False)
        return pc.if_else(pc.is_nan(numbers), None, numbers)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return None
    text = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    text = pc.if_else(pc.is_in(text, pa.array(TRUE_TEXTS, kind)), pa.scalar("1", kind), text)
    text = pc.if_else(pc.is_in(text, pa.array(FALSE_TEXTS, kind)), pa.scalar("0", kind), text)
    return pc.if_else(pc.match_substring_regex(text, NUMBER), text, pa.scalar(None, kind)).cast(pa.float64())
