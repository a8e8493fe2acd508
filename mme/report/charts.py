"""Line charts and heat maps as inline SVG, coloured by the page's CSS variables (--c0 … --c5, --heat, …)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 34
NUM_COLOURS = 6
MAX_POINTS = 400  # of a line: more than that no screen shows


@dataclass(frozen=True)
class Line:
    """Points (x, y) in rising x; ``faint`` for the raw data behind a smoothed line, ``marked`` to show each point."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    marked: bool = False
    colour: int = 0


def line_chart(lines: Sequence[Line], *, title: str, x_label: str = "step", from_zero: bool = False) -> str:
    """A ``<figure>`` with one chart; empty where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_label(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        parts.append(_drawn(line, place))
    legend = "".join(
        f'<span><i style="background:var(--c{line.colour % NUM_COLOURS})"></i>{escape(line.name)}</span>'
        for line in lines
        if not line.faint
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def heat_map(rows: Sequence[Sequence[float]], row_names: Sequence[str], column_names: Sequence[str]) -> str:
    """A table of shares, each cell the darker the larger its share is beside twice an even one."""
    head = "".join(f"<th>{escape(name)}</th>" for name in column_names)
    body = []
    for name, shares in zip(row_names, rows, strict=True):
        cells = []
        for share in shares:
            strength = min(1.0, share * len(shares) / 2)
            cells.append(
                f'<td style="--s:{100 * strength:.0f}%" class="{"strong" if strength > 0.6 else ""}">'
                f"{100 * share:.1f}</td>"
            )
        body.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.03) -> list[tuple[float, float]]:
    """Exponential moving average that reaches back over about ``share`` of the points."""
    reach = max(1.0, share * len(points))
    decay = math.exp(-1 / reach)
    total, weight, result = 0.0, 0.0, []
    for x, y in points:
        total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
        result.append((x, total / weight))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about ``count`` of them, that span low to high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _drawn(line: Line, place: Callable[[float, float], tuple[float, float]]) -> str:
    colour = f"var(--c{line.colour % NUM_COLOURS})"
    placed = [place(x, y) for x, y in _thinned(line.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline class="{"faint" if line.faint else "line"}" style="stroke:{colour}" points="{path}"/>']
    if line.marked or len(line.points) == 1:
        for (x, y), (step, value) in zip(placed, _thinned(line.points), strict=True):
            hint = f"{line.name}: {value:.4g} at {step:,.0f}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}"><title>{hint}</title></circle>'
            )
    return "".join(parts)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of them, evenly chosen, the last one included."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[round(index * (len(points) - 1) / (MAX_POINTS - 1))] for index in range(MAX_POINTS)]


def _label(value: float) -> str:
    if abs(value) >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
