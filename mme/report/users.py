"""The report's section about users: metrics by segment, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mme.report.charts import Chart, Line, bar_chart
from mme.report.results import SELECTED_BY, Z_95, RunFiles
from mme.report.sections import Rows, Section, section

BARS = "Bars with 95% confidence intervals over users."
SEGMENT_CHARTS = {
    "popularity": ("NDCG@10 by popularity of the target", "popularity rank of the target"),
    "history": ("NDCG@10 by length of the history", "events before the target"),
}


def users_section(run: RunFiles) -> Section | None:
    """NDCG@10 of the model and of popularity by segment, and example users; None if neither was recorded."""
    charts = _segment_charts(run.results)
    examples = run.result.get("examples") or []
    tables = [_examples(examples)] if examples else []
    return section("Results by user", charts, notes=[BARS], tables=tables)


def compared_users_section(runs: Sequence[RunFiles], names: Sequence[str]) -> Section | None:
    """NDCG@10 of each run by segment; None if no run recorded it."""
    charts = _segment_charts({name: run.result for name, run in zip(names, runs, strict=True)})
    return section("Results by user", charts, notes=[BARS])


def _segment_charts(results: Mapping[str, dict[str, Any]]) -> list[Chart | None]:
    return [_by_segment(results, kind, title, x_title) for kind, (title, x_title) in SEGMENT_CHARTS.items()]


def _by_segment(results: Mapping[str, dict[str, Any]], kind: str, title: str, x_title: str) -> Chart | None:
    by_model = {
        name: record.get("segments", {}).get(kind, []) for name, record in results.items() if record.get("segments")
    }
    groups: dict[str, int] = {}  # number of users by group, in the order of the records
    for rows in by_model.values():
        for row in rows:
            groups.setdefault(row["group"], row["users"])
    places = {name: place for place, name in enumerate(groups)}
    lines = [
        Line(
            name,
            [(places[row["group"]], row[SELECTED_BY]) for row in rows],
            colour=colour,
            errors=[Z_95 * row["standard_error"] for row in rows],
        )
        for colour, (name, rows) in enumerate(by_model.items())
    ]
    labels = [f"{name} ({users:,})" for name, users in groups.items()]
    return bar_chart(labels, lines, title=title, x_title=f"{x_title} (users)")


def _examples(examples: list[dict[str, Any]]) -> Rows:
    rows = [
        (
            example["user"],
            [" → ".join(example["history"]), " · ".join(example["top"]), example["target"], _rank(example.get("rank"))],
        )
        for example in examples
    ]
    head = ["newest events", "top of the list", "target", "its rank"]
    return Rows(
        rows, head=head, title="Example users of a batch, from the best to the worst rank of the target", text=True
    )


def _rank(rank: int | None) -> str:
    return "not ranked" if rank is None else f"{rank:,}"
