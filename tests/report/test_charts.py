"""Specifications of charts: Vega-Lite compiles them and draws the right marks."""

from __future__ import annotations

from typing import Any

import pytest
import vl_convert

from mme.report.charts import Chart, Line, bar_chart, heat_map, line_chart, smoothed, thinned
from scripts.bundle_vega import BUNDLE, VEGA_LITE, bundle


def drawn(chart: Chart | None) -> str:
    """Draws the chart as SVG with Vega, without a browser."""
    assert chart is not None
    spec = chart.spec | {"width": 400}
    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)


def rows(chart: Chart | None) -> list[dict[str, Any]]:
    assert chart is not None
    return chart.spec["data"]["values"]


def test_the_page_has_the_scripts_of_the_pinned_release() -> None:
    assert BUNDLE.read_text(encoding="utf-8") == bundle(), "run scripts/bundle_vega.py"


def test_line_chart_draws_a_line_for_each_name_and_a_dot_for_each_mark() -> None:
    chart = line_chart(
        [Line("loss", [(0, 0.0), (50, 0.4), (100, 1.0)]), Line("best", [(10, 0.5), (90, 0.7)], marked=True, colour=1)],
        title="a < b",
        rule_at=90,
    )
    svg = drawn(chart)
    assert svg.count('stroke="var(--c0)"') == 1 and svg.count('stroke="var(--c1)"') == 1
    assert svg.count('stroke-dasharray="4,4"') == 1
    assert svg.count('aria-roledescription="point"') == 2 + 5  # the marks, and the points for hovering
    assert line_chart([Line("nothing", [])], title="") is None


def test_confidence_band_is_drawn_only_around_its_line() -> None:
    banded = Line("with", [(0, 0.5), (1, 0.6)], errors=[0.1, 0.2])
    chart = line_chart([banded, Line("without", [(0, 0.1), (1, 0.2)], colour=1)], title="")
    assert [(row["low"], row["high"]) for row in rows(chart) if "low" in row] == [(0.4, 0.6), (0.4, 0.8)]
    assert drawn(chart).count('aria-roledescription="area mark"') == 1


def test_heat_map_is_darkest_at_its_largest_share() -> None:
    svg = drawn(heat_map([[0.1, 0.4], [0.2, 0.3]], ["r0", "r1"], ["c0", "c1"], title=""))
    strengths = [float(part.split('"')[0]) for part in svg.split('fill="var(--heat)" opacity="')[1:]]
    assert strengths == pytest.approx([0.03 + 0.97 * share / 0.4 for share in (0.1, 0.4, 0.2, 0.3)])
    assert all(f">{text}<" in svg for text in ("10.0", "40.0", "20.0", "30.0", "r1", "c1"))


def test_heat_map_of_many_experts_has_no_numbers_in_its_cells() -> None:
    svg = drawn(heat_map([[0.125] * 17], ["row"], [f"expert {place}" for place in range(17)], title=""))
    assert ">12.5<" not in svg


def test_a_ring_marks_one_point() -> None:
    chart = line_chart([Line("a", [(1, 0.5), (2, 0.6), (3, 0.4)], ring_at=2)], title="")
    assert [row["x"] for row in rows(chart) if row["ring"]] == [2]
    points = 3  # for hovering
    assert drawn(chart).count('aria-roledescription="point"') == points + 1


def test_the_number_of_users_is_on_a_line_of_its_own() -> None:
    svg = drawn(bar_chart(["50 (or so) (1,234)", "new (2)"], [Line("a", [(0, 0.5), (1, 0.2)])], title="", x_title="x"))
    for text in ("50 (or so)", "(1,234)", "new", "(2)"):
        assert f">{text}<" in svg, text


def test_bars_have_whiskers() -> None:
    chart = bar_chart(["few", "many"], [Line("a", [(0, 0.5), (1, 0.25)], errors=[0.1, 0.05])], title="", x_title="x")
    assert [(row["group"], row["y"], row["low"], row["high"]) for row in rows(chart)] == [
        ("few", 0.5, 0.4, 0.6),
        ("many", 0.25, 0.2, 0.3),
    ]
    assert drawn(chart).count('aria-roledescription="rule mark"') == 2


def test_time_axis_is_logarithmic_with_named_ticks() -> None:
    chart = line_chart([Line("", [(1, 0.5), (100_000, 0.1)])], title="", x_ticks={1: "1 s", 3600: "1 h", 86_400: "1 d"})
    svg = drawn(chart)
    assert all(f">{label}<" in svg for label in ("1 s", "1 h", "1 d"))


def test_smoothing_does_not_lag_even_at_the_ends() -> None:
    line = [(x, 3 - 0.01 * x) for x in range(300)]
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])
    assert [y for _, y in smoothed(line[:2])] == pytest.approx([3, 2.99])
    assert smoothed([(0, 2.0)]) == [(0, 2.0)] and smoothed([]) == []
    noisy = [(x, float(x % 2)) for x in range(1000)]
    assert all(abs(y - 0.5) < 0.03 for _, y in smoothed(noisy)[100:900])


def test_thinned_lines_keep_their_extremes_and_ends() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[1234], points[7777] = (1234.0, 9.0), (7777.0, -9.0)
    kept = thinned(points, 100)
    assert len(kept) <= 102 and {points[1234], points[7777], points[-1]} <= set(kept)
    assert kept == sorted(kept)
