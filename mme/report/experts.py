"""The report's section on how the routers spread the tokens over the experts, and its warnings."""

from __future__ import annotations

import math
from typing import Any

from mme.report.charts import Line, heat_map, line_chart
from mme.run.monitor import greedy_experts, starved_experts


def expert_warnings(last: dict[str, Any], top_k: int) -> list[str]:
    """Experts that get next to nothing, or nearly all that one can get, by the last record (empty: there is none)."""
    found = []
    for index, expert, share in starved_experts(last.get("load", [])):
        found.append(
            f"Expert {expert} of block {last['blocks'][index]} is starved: it gets {share:.2%} of the tokens. A larger "
            "model.moe.load_balance_coef or fewer experts would put it to use."
        )
    for index, expert, share in greedy_experts(last.get("load", []), top_k):
        found.append(
            f"Expert {expert} of block {last['blocks'][index]} takes nearly all: {share:.1%} of the tokens, of "
            f"{1 / top_k:.0%} possible. A larger model.moe.load_balance_coef would spread them."
        )
    return found


def experts_section(records: list[dict[str, Any]]) -> str:
    """The section as HTML, from the records of the kind "experts"; empty without any."""
    if not records:
        return ""
    last = records[-1]
    blocks = last["blocks"]
    rows, names = [], []
    for block, views in enumerate(last["load"]):
        for view, shares in enumerate(views):
            rows.append(shares)
            names.append(f"block {blocks[block]}, view {view}")
    columns = [f"expert {expert}" for expert in range(len(rows[0]))]
    lines = []
    for block in range(len(last["load"])):
        points = [(record["step"], _evenness(record["load"][block])) for record in records]
        lines.append(Line(f"block {blocks[block]}", points, colour=block))
    charts = [line_chart(lines, title="Evenness of the load (1: all experts alike)", from_zero=True)]
    charts += [
        line_chart(_mean_of_views(records, name), title=title, from_zero=True)
        for name, title in {
            "entropy": "Router entropy of a token, nats, mean of the views",
            "dropped": "Share of the choices that found their expert full, mean of the views",
        }.items()
        if name in last
    ]
    return (
        f"<section><h2>Experts</h2><p class='note'>Share of a view's routed tokens that each expert gets at step "
        f"{last['step']:,}, in percent; an even share is {100 / len(rows[0]):.1f}.</p>{heat_map(rows, names, columns)}"
        f"<div class='charts'>{''.join(chart for chart in charts if chart)}</div></section>"
    )


def _mean_of_views(records: list[dict[str, Any]], name: str) -> list[Line]:
    """A line a block, of a figure recorded by block and view."""
    recorded = [record for record in records if name in record]
    return [
        Line(
            f"block {label}",
            [(record["step"], sum(record[name][index]) / len(record[name][index])) for record in recorded],
            colour=index,
        )
        for index, label in enumerate(recorded[-1]["blocks"])
    ]


def _evenness(views: list[list[float]]) -> float:
    """Entropy of the experts' load, over the views together, as a share of the largest possible."""
    load = [sum(view[expert] for view in views) / len(views) for expert in range(len(views[0]))]
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    return entropy / math.log(len(load)) if len(load) > 1 else 1.0
