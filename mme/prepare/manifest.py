"""The part of dataset.json about the origin of a training set, so that the set can be checked and extended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mme.data.features import split_kind
from mme.prepare.feedback import FeedbackFilter
from mme.prepare.formats import ReadOptions
from mme.prepare.histories import CountFilter
from mme.prepare.input_file import InputFile, input_sum
from mme.prepare.malformed import EXAMPLES

SORT_RULE = "stable by (timestamp, original row)"
TOTALS = ("rows_read", "malformed_rows", "unwanted_rows", "duplicate_rows")


@dataclass(frozen=True)
class Settings:
    """How files are read and which events are kept; the same for all files that are added to a set.

    Attributes:
        features: further columns to keep, by name or as ``name:kind``, see `mme.data.features`.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    feedback: FeedbackFilter = field(default_factory=FeedbackFilter)
    counts: CountFilter = field(default_factory=lambda: CountFilter(1, 1, True))
    features: list[str] = field(default_factory=list)

    @property
    def feature_kinds(self) -> dict[str, str]:
        """The kinds of the further columns by their names."""
        return dict(map(split_kind, self.features))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The settings that `to_dict` turned into ``values``."""
        known = {name: values[name] for name in ReadOptions.__dataclass_fields__ if name in values}
        return cls(
            ReadOptions(**known),
            FeedbackFilter(**values["feedback"]),
            CountFilter(**values["counts"]),
            values.get("features", []),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings for dataset.json."""
        values = asdict(self)
        return {**values.pop("read"), **values}


def describe(
    name: str, settings: Settings, id_types: dict[str, str], run: dict[str, Any], earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """The part of dataset.json about the origin: each run, and the sums over all runs.

    ``run`` counts what this run read and left out (with `files` and `TOTALS`); ``earlier`` is the previous dataset.json if events
    are added to a set.
    """
    runs = [*(earlier["runs"] if earlier else []), run]
    return {
        "name": name,
        "sort_rule": SORT_RULE,
        "id_types": id_types,
        "settings": settings.to_dict(),
        "source": {"files": [file for each in runs for file in each["files"]]},
        **{total: sum(each[total] for each in runs) for total in TOTALS},
        "malformed": _sum_malformed([each["malformed"] for each in runs]),
        "unwanted": _sum_counts([each["unwanted"] for each in runs]),
        "runs": runs,
    }


def file_record(path: InputFile) -> dict[str, Any]:
    """Name, size and SHA-256 of an input file."""
    return {"name": path.name, **input_sum(path)}


def _sum_malformed(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for report in reports:
        for reason, found in report.items():
            entry = total.setdefault(reason, {"rows": 0, "first": []})
            entry["rows"] += found["rows"]
            entry["first"] = [*entry["first"], *found["first"]][:EXAMPLES]
    return total


def _sum_counts(reports: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for report in reports:
        for reason, number in report.items():
            total[reason] = total.get(reason, 0) + number
    return total
