"""The content of the page's sections, which the templates turn into HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mme.report.charts import Chart


@dataclass(frozen=True)
class Rows:
    """A table: ``rows`` of (name, cells), below an optional ``head``.

    Attributes:
        strong: the row to emphasise.
        text: whether the cells are texts that may wrap, instead of numbers; such a table is placed below the charts.
    """

    rows: Sequence[tuple[str, Sequence[str]]]
    head: Sequence[str] = ()
    title: str = ""
    strong: int | None = None
    text: bool = False


@dataclass(frozen=True)
class Section:
    """A card of the page: notes, tables of numbers, then charts, two per row on a wide screen."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Rows] = ()
    charts: Sequence[Chart] = field(default_factory=list)


def section(
    title: str, charts: Iterable[Chart | None], *, notes: Sequence[str] = (), tables: Sequence[Rows] = ()
) -> Section | None:
    """A section with the charts that are not None; None if it has neither charts nor tables."""
    drawn = [chart for chart in charts if chart is not None]
    return Section(title, notes, tables, drawn) if drawn or tables else None


def points(records: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that contain ``key``."""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]
