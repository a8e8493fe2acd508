"""The report's section on what the model has learned, from the figures of `mme.evaluation.insight`."""

from __future__ import annotations

from typing import Any

from mme.report.charts import Line, heat_map, line_chart

BY = {
    "view": "Which expert serves which view",
    "popularity": "… which items, by popularity: the first row holds the most popular tenth of the catalogue",
    "position": "… which place in the history, counted from the oldest event that the decoder reads",
}
SECONDS_PER_BUCKET = 0.301  # of the natural logarithm


def insight_section(found: dict[str, Any]) -> str:
    """The section as HTML; empty where a run recorded no insight."""
    if not found:
        return ""
    spectra = [
        Line(
            f"table {view}", [(place + 1, value / (values[0] or 1)) for place, value in enumerate(values)], colour=view
        )
        for view, values in enumerate(found["singular_values"])
    ]
    ranks = ", ".join(f"{rank:.1f}" for rank in found["effective_rank"])
    charts = line_chart(spectra, title="Singular values of each table, largest = 1", x_label="place", from_zero=True)
    charts += "".join(_curves(found))
    note = f"Effective rank of the tables, of {len(found['singular_values'][0])} possible: {ranks}."
    tables = [_ranking(found["ranking"])] if "ranking" in found else []
    tables += [_similarity(found["similarity"])] if len(found["similarity"]) > 1 else []
    tables += _routing(found["routing"]) if "routing" in found else []
    return (
        f"<section><h2>What the model learned</h2><p class='note'>{note} A table that collapses has a few large singular "
        f"values and a low effective rank.</p><div class='charts'>{charts}</div>{''.join(tables)}</section>"
    )


def _curves(found: dict[str, Any]) -> list[str]:
    shown = {
        "time_weights": ("Weight by the time between events", "ln(seconds)", SECONDS_PER_BUCKET),
        "position_weights": ("Weight by the number of events between", "events back", 1),
    }
    return [
        line_chart(
            [
                Line(f"block {block}", [(place * unit, weight) for place, weight in enumerate(weights)], colour=block)
                for block, weights in enumerate(found[name])
            ],
            title=title,
            x_label=x_label,
        )
        for name, (title, x_label, unit) in shown.items()
        if name in found
    ]


def _ranking(ranking: dict[str, Any]) -> str:
    by_view = "".join(f", by view {view} alone {value:.4f}" for view, value in enumerate(ranking["ndcg@10"]))
    return (
        f"<h3>How well each view predicts alone: NDCG@10 by its share of the score, {ranking['users']:,} histories</h3>"
        f"<p>By all views {ranking['all_views']:.4f}{by_view}.</p>"
    )


def _similarity(similarity: list[list[float]]) -> str:
    names = [f"view {view}" for view in range(len(similarity))]
    table = heat_map(similarity, names, names)
    return f"<h3>How alike the views' tables are: linear CKA, 100 for the same up to rotation and scale</h3>{table}"


def _routing(routing: dict[str, Any]) -> list[str]:
    parts = []
    for name, title in BY.items():
        groups, shares = routing[name]["groups"], routing[name]["share"]
        rows, names = [], []
        for block, by_group in zip(routing["blocks"], shares, strict=True):
            for group, row in zip(groups, by_group, strict=True):
                if any(row):  # no history reached it
                    rows.append(row)
                    names.append(f"block {block}, {group}")
        columns = [f"expert {expert}" for expert in range(len(shares[0][0]))]
        parts.append(f"<h3>{title}, percent of the row's choices</h3>{heat_map(rows, names, columns)}")
    return parts
