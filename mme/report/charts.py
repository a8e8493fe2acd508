"""Charts as Vega-Lite specifications, made with Altair and rendered by Vega in the page.

Colours are CSS variables of the page (--c0 … --c7, --heat), so that charts follow its light and dark scheme. Text from
files is used only as data or label, never as an expression or field name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from mme.errors import one_line

NUM_COLOURS = 8
MAX_POINTS = 600  # points per line, about as many as a screen can show
HEIGHT = 230
CELL_HEIGHT = 24
TWO_LINES = "split(replace(datum.label, / (?=[(][^(]*$)/, '\\n'), '\\n')"  # a break before the last parenthesis
LABELLED_COLUMNS = 16  # a heat map with more columns shows its numbers only on hover

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points (x, y) with ascending x.

    Attributes:
        faint: draw faintly, as raw data behind a smoothed line.
        marked: draw a dot at each point.
        errors: half the height of a band around each point; None: no band.
        ring_at: x of a point with a ring around it, such as the step of the chosen checkpoint.
    """

    name: str
    points: Sequence[Point]
    faint: bool = False
    marked: bool = False
    colour: int = 0
    errors: Sequence[float] | None = None
    ring_at: float | None = None


@dataclass(frozen=True)
class Chart:
    """A figure of the page: a Vega-Lite ``spec`` and the legend above it."""

    title: str
    spec: dict[str, Any]
    legend: list[Line] = field(default_factory=list)
    note: str = ""
    wide: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_title: str = "step",
    from_zero: bool = False,
    rule_at: float | None = None,
    x_ticks: dict[float, str] | None = None,
) -> Chart | None:
    """A line chart; None if no line has a point.

    Args:
        rule_at: x of a dashed vertical line, such as the step of the chosen checkpoint.
        x_ticks: labels by x; makes the x axis logarithmic.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    names = [one_line(line.name) for line in lines]
    colours = [f"var(--c{line.colour % NUM_COLOURS})" for line in lines]
    rows = [row for line in lines for row in _rows(line)]
    shared = alt.Chart()
    x = alt.X("x:Q", title=x_title, axis=_x_axis(rows, x_ticks), scale=_x_scale(rows, x_ticks))
    y = alt.Y("y:Q", title=None, scale=alt.Scale(zero=from_zero), axis=_y_axis(rows))
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=None)
    opacity = alt.Opacity("faint:Q", scale=alt.Scale(domain=[0, 1], range=[1, 0.35]), legend=None)
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey || event.metaKey]"
    )
    drawn = shared.mark_line(clip=True, strokeWidth=2).encode(x=x, y=y, color=colour, opacity=opacity)
    layers: list[Any] = [drawn.add_params(zoom)]
    if any(line.errors is not None for line in lines):
        bands = shared.transform_filter("isValid(datum.low)").mark_area(clip=True, opacity=0.18)
        layers.insert(0, bands.encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q", color=colour))
    if any(line.marked or len(line.points) == 1 for line in lines):
        dots = shared.transform_filter("datum.dot").mark_point(clip=True, filled=True, size=36, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour))
    if any(row["ring"] for row in rows):
        rings = shared.transform_filter("datum.ring").mark_point(clip=True, filled=False, size=160, strokeWidth=2)
        layers.append(rings.encode(x=x, y=y, color=colour))
    if rule_at is not None:
        rule = alt.Chart(alt.Data(values=[{"x": rule_at}])).mark_rule(clip=True, strokeDash=[4, 4], color="var(--soft)")
        layers.append(rule.encode(x="x:Q"))
    layers.append(_hover(shared, x, y, colour, x_title))
    spec = _spec(layers, rows, HEIGHT)
    return Chart(title, spec, legend=lines if len(lines) > 1 or lines[0].name else [])


def heat_map(
    rows: Sequence[Sequence[float]], row_names: Sequence[str], column_names: Sequence[str], *, title: str
) -> Chart:
    """A heat map of shares: the largest is darkest, and 0 has no colour. Hovering shows row, column and percent."""
    largest = max((share for row in rows for share in row), default=0.0) or 1.0
    cells = [
        {"row": one_line(name), "column": one_line(column), "share": significant(share), "text": f"{100 * share:.1f}"}
        for name, shares in zip(row_names, rows, strict=True)
        for column, share in zip(column_names, shares, strict=True)
    ]
    base = alt.Chart().encode(
        x=alt.X("column:N", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=0, labelOverlap=True)),
        y=alt.Y("row:N", sort=None, title=None),
        tooltip=[
            alt.Tooltip("row:N", title="row"),
            alt.Tooltip("column:N", title="column"),
            alt.Tooltip("text:N", title="percent"),
        ],
    )
    strength = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, largest], range=[0.03, 1]), legend=None)
    layers: list[Any] = [base.mark_rect(color="var(--heat)", cornerRadius=3).encode(opacity=strength)]
    if len(column_names) <= LABELLED_COLUMNS:
        dark = alt.condition(f"datum.share > {0.55 * largest}", alt.value("#fff"), alt.value("var(--text)"))
        layers.append(base.mark_text(fontSize=11).encode(text="text:N", color=dark))
    note = f"Percent. The darkest cell is {100 * largest:.1f}."
    return Chart(title, _spec(layers, cells, CELL_HEIGHT * len(row_names)), note=note, wide=True)


def bar_chart(groups: Sequence[str], lines: Sequence[Line], *, title: str, x_title: str) -> Chart | None:
    """A grouped bar chart; a line's points are (index of the group, value). None if no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    names = [one_line(line.name) for line in lines]
    rows = [
        {
            "group": one_line(groups[int(x)]),
            "series": one_line(line.name),
            "y": significant(y),
            "at": one_line(groups[int(x)]),
        }
        | _with_error(y, None if line.errors is None else line.errors[index])
        for line in lines
        for index, (x, y) in enumerate(line.points)
    ]
    colours = [f"var(--c{line.colour % NUM_COLOURS})" for line in lines]
    shared = alt.Chart().encode(
        x=alt.X("group:N", sort=None, title=x_title, axis=alt.Axis(labelAngle=0, labelExpr=TWO_LINES)),
        xOffset=alt.XOffset("series:N", sort=None),
        color=alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=None),
        tooltip=[alt.Tooltip("series:N"), alt.Tooltip("at:N", title=x_title), alt.Tooltip("value:N")],
    )
    bars = shared.mark_bar(cornerRadiusEnd=2, opacity=0.85).encode(y=alt.Y("y:Q", title=None, axis=_y_axis(rows)))
    whiskers = shared.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5)
    whiskers = whiskers.encode(y=alt.Y("low:Q", title=None), y2="high:Q", color=alt.value("var(--text)"))
    return Chart(title, _spec([bars, whiskers], rows, HEIGHT), legend=lines)


def smoothed(points: Sequence[Point], share: float = 0.02) -> list[Point]:
    """A local linear regression whose weights decay exponentially over ``share`` of the points on either side.

    Unlike a moving average it does not lag behind a slope, also at the ends.
    """
    decay = math.exp(-1 / max(1.0, share * len(points)))
    values = [y for _, y in points]
    before, after = _decayed(values, decay), _decayed(values[::-1], decay)[::-1]
    found = []
    for (x, y), of_before, of_after in zip(points, before, after, strict=True):
        # Sums of w, w·i, w·i², w·y and w·i·y over all points, where i is their distance in points: negative before this one.
        signs = (1, -1, 1, 1, -1)
        w, wi, wii, wy, wiy = (sign * b + a for sign, b, a in zip(signs, of_before, of_after, strict=True))
        w, wy = w - 1, wy - y  # this point is in both
        scale = w * wii - wi * wi
        found.append((x, (wii * wy - wi * wiy) / scale if scale else y))
    return found


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """About ``limit`` of the points: the minimum and maximum of each of limit / 2 intervals, and the last point."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(2 * len(points) / limit)
    kept = set()
    for start in range(0, len(points), stretch):
        places = range(start, min(start + stretch, len(points)))
        kept |= {min(places, key=lambda place: points[place][1]), max(places, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept | {len(points) - 1})]


def significant(value: float) -> float:
    return float(f"{value:.6g}")


def _decayed(values: Sequence[float], decay: float) -> list[tuple[float, float, float, float, float]]:
    """For each value, the sums of w, w·i, w·i², w·y and w·i·y over it and all previous ones, i places back with w = decay^i."""
    w = wi = wii = wy = wiy = 0.0
    sums = []
    for y in values:
        w, wi, wii = decay * w + 1, decay * (wi + w), decay * (wii + 2 * wi + w)
        wy, wiy = decay * wy + y, decay * (wiy + wy)
        sums.append((w, wi, wii, wy, wiy))
    return sums


def _rows(line: Line) -> list[dict[str, Any]]:
    """The rows of the chart's data for a line's points."""
    kept = line.points if line.errors is not None else thinned(line.points)
    errors = line.errors if line.errors is not None else [None] * len(kept)
    return [
        {
            "x": significant(x),
            "y": significant(y),
            "series": one_line(line.name),
            "faint": int(line.faint),
            "dot": line.marked or len(line.points) == 1,
            "ring": x == line.ring_at,
            "at": f"{x:,.6g}",
        }
        | _with_error(y, error)
        for (x, y), error in zip(kept, errors, strict=True)
    ]


def _with_error(y: float, error: float | None) -> dict[str, Any]:
    """The text of a value and, with an error, its interval, which does not extend below 0 for values from 0 up."""
    if error is None:
        return {"value": f"{y:.4g}"}
    low = max(y - error, 0.0) if y >= 0 else y - error
    return {"value": f"{y:.4g} ± {error:.2g}", "low": significant(low), "high": significant(y + error)}


def _x_axis(rows: list[dict[str, Any]], ticks: dict[float, str] | None) -> alt.Axis:
    if ticks is None:
        return alt.Axis(grid=False, format=_number_format(row["x"] for row in rows), tickCount=6, labelOverlap=True)
    labels = " : ".join(f"datum.value == {value:g} ? '{label}'" for value, label in ticks.items())
    return alt.Axis(grid=False, values=list(ticks), labelExpr=f"{labels} : ''", labelOverlap=True)


def _y_axis(rows: list[dict[str, Any]]) -> alt.Axis:
    return alt.Axis(tickCount=5, format=_number_format(row["y"] for row in rows))


def _number_format(values: Iterable[float]) -> str:
    """A d3-format: 20k if the largest value has at least five digits, otherwise plain decimals."""
    return "~s" if max(map(abs, values)) >= 10_000 else ",.6~r"


def _x_scale(rows: list[dict[str, Any]], ticks: dict[float, str] | None) -> alt.Scale:
    low, high = min(row["x"] for row in rows), max(row["x"] for row in rows)
    domain = [low, high if high > low else low + 1]
    return alt.Scale(domain=domain, nice=False, type="linear" if ticks is None else "log")


def _hover(shared: alt.Chart, x: alt.X, y: alt.Y, colour: alt.Color, x_title: str) -> alt.Chart:
    """A dot with a tooltip at the point nearest to the pointer."""
    nearest = alt.selection_point(
        name="hover", nearest=True, on="pointermove", clear="pointerout", empty=False, encodings=["x", "y"]
    )
    dots = shared.mark_point(clip=True, filled=True, size=70)
    return dots.encode(
        x=x,
        y=y,
        color=colour,
        opacity=alt.condition(nearest, alt.value(1), alt.value(0)),
        tooltip=[
            alt.Tooltip("series:N", title="line"),
            alt.Tooltip("at:N", title=x_title),
            alt.Tooltip("value:N", title="value"),
        ],
    ).add_params(nearest)


def _spec(layers: list[Any], rows: list[dict[str, Any]], height: int) -> dict[str, Any]:
    chart = alt.layer(*layers, data=alt.Data(values=rows)).properties(width="container", height=height)
    spec = chart.to_dict()
    for name in ("$schema", "config"):  # depend on Altair's release and theme; the page sets its own
        del spec[name]
    return spec
