"""The report's section about the routers' distribution of tokens over experts, and its warnings."""

from __future__ import annotations

import math
from typing import Any

from mme.report.charts import Chart, Line, heat_map, line_chart
from mme.report.sections import Section, section
from mme.run.expert_load import greedy_experts, starved_experts


def expert_warnings(last: dict[str, Any], top_k: int) -> list[str]:
    """Warnings about experts that get almost no or almost all tokens; ``last``: the last "experts" record, or empty."""
    found = []
    for index, expert, share in starved_experts(last.get("load", [])):
        found.append(
            f"Expert {expert} of block {last['blocks'][index]} is starved: it gets {share:.2%} of the tokens. Increase "
            "model.moe.load_balance_coef or use fewer experts."
        )
    for index, expert, share in greedy_experts(last.get("load", []), top_k):
        found.append(
            f"Expert {expert} of block {last['blocks'][index]} gets nearly all tokens: {share:.1%} of at most "
            f"{1 / top_k:.0%}. Increase model.moe.load_balance_coef to distribute them."
        )
    return found


def experts_section(records: list[dict[str, Any]]) -> Section | None:
    """The section for the records of the kind "experts"; None if there are none."""
    if not records:
        return None
    last = records[-1]
    names = [
        f"block {block}, view {view}"
        for block, views in zip(last["blocks"], last["load"], strict=True)
        for view in range(len(views))
    ]
    rows = [shares for views in last["load"] for shares in views]
    columns = [f"expert {expert}" for expert in range(len(rows[0]))]
    charts: list[Chart | None] = [
        heat_map(rows, names, columns, title=f"Load of each expert at step {last['step']:,}"),
        line_chart(_evenness_lines(records), title="Evenness of the load (1: all experts get the same)"),
    ]
    charts += [
        line_chart(_mean_of_views(records, name), title=title, from_zero=True)
        for name, title in {
            "entropy": "Router entropy per token in nats, mean over the views",
            "dropped": "Share of choices dropped because the expert was full, mean over the views",
        }.items()
    ]
    note = (
        f"The load is the share of a view's routed tokens that an expert gets; an even share is {1 / len(rows[0]):.1%}."
    )
    return section("Experts", charts, notes=[note])


def _evenness_lines(records: list[dict[str, Any]]) -> list[Line]:
    shape = len(records[-1]["blocks"])
    kept = [record for record in records if len(record["load"]) == shape]
    return [
        Line(f"block {block}", [(record["step"], _evenness(record["load"][index])) for record in kept], colour=index)
        for index, block in enumerate(records[-1]["blocks"])
    ]


def _mean_of_views(records: list[dict[str, Any]], name: str) -> list[Line]:
    """One line per block for a figure recorded by block and view."""
    blocks = records[-1]["blocks"]
    kept = [record for record in records if len(record.get(name) or []) == len(blocks)]
    return [
        Line(
            f"block {block}",
            [(record["step"], sum(record[name][index]) / len(record[name][index])) for record in kept],
            colour=index,
        )
        for index, block in enumerate(blocks)
    ]


def _evenness(views: list[list[float]]) -> float:
    """Entropy of the experts' load, averaged over the views, as a share of the maximum."""
    load = [sum(view[expert] for view in views) / len(views) for expert in range(len(views[0]))]
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    return entropy / math.log(len(load)) if len(load) > 1 else 1.0
