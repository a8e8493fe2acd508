"""The report's section about what the model learned, from the figures of `mme.evaluation.insight`."""

from __future__ import annotations

import math
from typing import Any

from mme.report.charts import Chart, Line, heat_map, line_chart
from mme.report.sections import Rows, Section, section

ROUTING_BY = {
    "view": "Experts by view",
    "popularity": "Experts by popularity of the item (the first row is the most popular tenth of the catalogue)",
    "position": "Experts by position in the history, counted from the oldest event that the decoder reads",
}
LOG_SECONDS_PER_BUCKET = 0.301  # width of a time bucket, see `kernels.relative_attention.reference.time_bucket`
DAY_S, YEAR_S = 86_400, 31_557_600
DURATIONS: dict[float, str] = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 21_600: "6 h", DAY_S: "1 d", 7 * DAY_S: "7 d",
             30 * DAY_S: "30 d", YEAR_S: "1 y", 10 * YEAR_S: "10 y"}  # fmt: skip
LONGEST_GAP_S = 20 * YEAR_S  # default for runs that did not record it


def insight_section(found: dict[str, Any]) -> Section | None:
    """The section; None if the run recorded no insight."""
    if not found:
        return None
    charts: list[Chart | None] = [_spectra(found["singular_values"])]
    charts += [_time_weights(found), _position_weights(found)]
    if len(found["similarity"]) > 1:
        names = [f"view {view}" for view in range(len(found["similarity"]))]
        title = "Similarity of the views' tables: linear CKA, 100 for tables that differ only by rotation and scale"
        charts.append(heat_map(found["similarity"], names, names, title=title))
    charts += _routing(found.get("routing"))
    ranks = ", ".join(f"{rank:.1f}" for rank in found["effective_rank"])
    notes = [
        f"Effective rank of the tables, at most {len(found['singular_values'][0])}: {ranks}. A collapsed table has a few "
        "large singular values and a low effective rank."
    ]
    tables = [_view_ranking(found["ranking"])] if found.get("ranking") else []
    tables += [_neighbours(found["neighbours"])] if found.get("neighbours") else []
    return section("What the model learned", charts, notes=notes, tables=tables)


def _spectra(singular_values: list[list[float]]) -> Chart | None:
    lines = [
        Line(
            f"table {view}", [(place + 1, value / (values[0] or 1)) for place, value in enumerate(values)], colour=view
        )
        for view, values in enumerate(singular_values)
    ]
    return line_chart(lines, title="Singular values of each table, largest = 1", x_title="rank", from_zero=True)


def _time_weights(found: dict[str, Any]) -> Chart | None:
    """The weights up to the longest time between two events; those beyond were never trained."""
    longest = found.get("longest_gap_s") or LONGEST_GAP_S
    buckets = int(math.log(max(longest, 2)) / LOG_SECONDS_PER_BUCKET) + 1
    lines = [
        Line(
            f"block {block}",
            [(math.exp(bucket * LOG_SECONDS_PER_BUCKET), weight) for bucket, weight in enumerate(weights[:buckets])],
            colour=block,
        )
        for block, weights in enumerate(found.get("time_weights", []))
    ]
    ticks = {seconds: label for seconds, label in DURATIONS.items() if seconds <= longest}
    return line_chart(
        lines, title="Attention weight by time between events", x_title="time between events, s", x_ticks=ticks
    )


def _position_weights(found: dict[str, Any]) -> Chart | None:
    lines = [
        Line(f"block {block}", list(enumerate(weights)), colour=block)
        for block, weights in enumerate(found.get("position_weights", []))
    ]
    return line_chart(lines, title="Attention weight by distance in events", x_title="events back")


def _view_ranking(ranking: dict[str, Any]) -> Rows:
    rows = [("all views", [f"{ranking['all_views']:.4f}"])]
    rows += [(f"view {view} alone", [f"{value:.4f}"]) for view, value in enumerate(ranking["ndcg@10"])]
    return Rows(
        rows, head=["NDCG@10"], title=f"Ranking by each view's part of the score, {ranking['users']:,} histories"
    )


def _neighbours(found: list[dict[str, Any]]) -> Rows:
    rows = [
        (
            of["item"],
            [f"{of['events']:,}", " · ".join(f"{other['item']} {other['similarity']:.2f}" for other in of["nearest"])],
        )
        for of in found
    ]
    title = "Nearest neighbours of the most popular items, with the similarity of their vectors"
    return Rows(rows, head=["training events", "nearest items"], title=title, text=True)


def _routing(routing: dict[str, Any] | None) -> list[Chart]:
    if not routing:
        return []
    charts = []
    for name, title in ROUTING_BY.items():
        groups, shares = routing[name]["groups"], routing[name]["share"]
        rows, names = [], []
        for block, by_group in zip(routing["blocks"], shares, strict=True):
            for group, row in zip(groups, by_group, strict=True):
                if any(row):  # otherwise no history reached the group
                    rows.append(row)
                    names.append(f"block {block}, {group}")
        if rows:
            columns = [f"expert {expert}" for expert in range(len(rows[0]))]
            charts.append(heat_map(rows, names, columns, title=title))
    return charts
