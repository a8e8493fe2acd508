"""The report's curves over the steps of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mme.report.charts import Chart, Line, line_chart, smoothed
from mme.report.results import POPULARITY, Z_95, RunFiles
from mme.report.sections import Section, points, section

CURVES = {"ndcg@10": "Validation NDCG@10", "hr@10": "Validation HR@10"}
COSTS = {  # figures of the train records
    "tokens_per_s": "Throughput, tokens/s",
    "mfu": "Model FLOPs utilisation (1: the devices' peak)",
    "peak_mem_gib": "Peak memory of the fullest rank, GiB",
    "exposed_communication": "Exposed communication, share of the step",
}


def training_section(run: RunFiles) -> Section | None:
    """Loss, validation metrics with the chosen checkpoint, and costs of one run."""
    train = run.of_kind("train")
    loss = points(train, "loss")
    chosen = _chosen_step(run)
    lines = [Line("recorded steps", loss, faint=True), Line("smoothed", smoothed(loss))]
    charts = [line_chart(lines, title="Training loss", rule_at=chosen)]
    valid = [record for record in run.of_kind("eval") if record.get("split") == "valid" and record.get("model")]
    models = sorted({record["model"] for record in valid}, key=lambda name: name == POPULARITY)
    for metric, title in CURVES.items():
        lines = [
            metric_line(model, [record for record in valid if record["model"] == model], metric, colour)
            for colour, model in enumerate(models)
        ]
        charts.append(line_chart(lines, title=title, from_zero=True, rule_at=chosen))
    charts += [
        line_chart([Line("", points(train, key), colour=2)], title=title, from_zero=True)
        for key, title in COSTS.items()
    ]
    charts.append(_waiting(train))
    notes = [f"The dashed line marks the chosen checkpoint, step {chosen:,}."] if chosen is not None else []
    return section("Training", charts, notes=notes)


def compared_training_section(runs: Sequence[RunFiles], names: Sequence[str]) -> Section | None:
    """The same curves with one line per run."""
    loss: list[Line] = []
    by_cost: dict[str, list[Line]] = {key: [] for key in COSTS}
    by_metric: dict[str, list[Line]] = {metric: [] for metric in CURVES}
    for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
        train = run.of_kind("train")
        loss.append(Line(name, smoothed(points(train, "loss")), colour=colour))
        for key, lines in by_cost.items():
            lines.append(Line(name, points(train, key), colour=colour))
        valid = [
            record
            for record in run.of_kind("eval")
            if record.get("split") == "valid" and record.get("model") not in (None, POPULARITY)
        ]
        for metric, lines in by_metric.items():
            lines.append(metric_line(name, valid, metric, colour, _chosen_step(run)))
    charts = [line_chart(loss, title="Training loss, smoothed")]
    charts += [line_chart(by_metric[metric], title=title, from_zero=True) for metric, title in CURVES.items()]
    charts += [line_chart(by_cost[key], title=title, from_zero=True) for key, title in COSTS.items()]
    rung = any(_chosen_step(run) is not None for run in runs)
    return section("Training", charts, notes=["Rings mark the chosen checkpoints."] if rung else [])


def metric_line(
    name: str, records: Sequence[dict[str, Any]], metric: str, colour: int, ring_at: int | None = None
) -> Line:
    """A metric over the steps, with its 95% confidence interval if every record has a standard error."""
    kept = [record for record in records if record.get(metric) is not None]
    errors = [record.get("standard_errors", {}).get(metric) for record in kept]
    band = [Z_95 * error for error in errors] if errors and None not in errors else None
    return Line(name, points(kept, metric), marked=True, colour=colour, errors=band, ring_at=ring_at)


def _chosen_step(run: RunFiles) -> int | None:
    """The step of the tested checkpoint if validation chose it; None otherwise."""
    valid = any(record.get("split") == "valid" for record in run.of_kind("eval"))
    return run.step if valid and run.split == "test" else None


def _waiting(train: Sequence[dict[str, Any]]) -> Chart | None:
    lines = [
        Line("waiting in collectives, mean over the ranks", points(train, "wait_ms")),
        Line("slowest rank beyond the mean", points(train, "straggler_ms"), colour=1),
    ]
    return line_chart(lines, title="Waiting per step, ms", from_zero=True)
