"""report.html of a run: results beside the baseline, curves, expert load, configuration, in one file without any other.

From the run's folder and, if it is still there, the data's dataset.json; what a run has not recorded is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from mme.config import CONFIG_FILE, Config, load_saved_config
from mme.errors import UserError
from mme.files import read_text, write_text
from mme.report.charts import Line, line_chart, smoothed
from mme.report.experts import expert_warnings, experts_section
from mme.report.insight import insight_section
from mme.report.style import STYLE
from mme.run.metrics_file import METRICS_FILE, read_metrics
from mme.run.monitor import duration

METRICS = ["hr@10", "hr@50", "ndcg@10", "ndcg@50", "mrr"]


@dataclass(frozen=True)
class Run:
    """What a run's folder says. ``results``: model → its last record on the test split (else on the validation split),
    the trained model first; ``oracle``: metric → the value that knowing the data's true process reaches, if known."""

    folder: Path
    config: Config
    config_text: str
    records: list[dict[str, Any]]
    dataset: dict[str, Any]
    results: dict[str, dict[str, Any]]
    oracle: dict[str, float]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: no such folder, or one of its files is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder (made by `mme train`, as output_dir)")
    records = read_metrics(folder / METRICS_FILE)
    if not records:
        raise UserError(f"{folder / METRICS_FILE}: empty: expected the metrics of a run (made by `mme train`)")
    config = load_saved_config(folder)
    dataset = _dataset_info(Path(config.data.path))
    results = _results(records)
    oracle = _oracle(dataset, next(iter(results.values()), {}))
    return Run(folder, config, read_text(folder / CONFIG_FILE, folder), records, dataset, results, oracle)


def write_report(run: Path) -> Path:
    """Writes ``report.html`` into the run's folder and returns its path.

    Raises:
        UserError: see `read_run`.
    """
    page = _page(read_run(run))
    path = run / "report.html"
    write_text(path, page, run)
    return path


def results_table(run: Run) -> Table | None:
    """The metrics of each model, the lift over popularity and the oracle's, for a terminal; None without results."""
    if not run.results:
        return None
    split, step = _split_and_step(run)
    table = Table(title=f"{run.folder}: {split} metrics at step {step:,}", title_justify="left")
    table.add_column("")
    for metric in METRICS:
        table.add_column(metric.upper(), justify="right")
    for name, values in _result_rows(run):
        table.add_row(name, *values, style="bold" if name == next(iter(run.results)) else None)
    return table


def _results(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    evaluations = [record for record in records if record["kind"] == "eval" and "model" in record]
    tested = [record for record in evaluations if record.get("split") == "test"]
    latest = {record["model"]: record for record in tested or evaluations}
    return dict(sorted(latest.items(), key=lambda item: item[0] == "popularity"))


def _dataset_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "dataset.json").read_text())
    except (OSError, ValueError):  # moved or removed since: the report does without
        return {}
    return info if isinstance(info, dict) else {}


def _oracle(dataset: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """What the oracle of a generated data set reaches on the events that ``result`` was measured on, if it is known."""
    if result.get("protocol") != "leave_two_out":
        return {}
    known = dataset.get("oracle", {}).get(result.get("split"), {})
    return {metric: value for metric, value in known.items() if metric in METRICS}


def _result_rows(run: Run) -> list[tuple[str, list[str]]]:
    """(name, one text per metric): the models, how many times popularity the model reaches, the oracle."""
    rows = [(name, [_figure(record.get(metric)) for metric in METRICS]) for name, record in run.results.items()]
    names = list(run.results)
    if len(names) > 1 and "popularity" in run.results:
        model, baseline = run.results[names[0]], run.results["popularity"]
        rows.append(("times popularity", [_ratio(model.get(m), baseline.get(m)) for m in METRICS]))
    if run.oracle:
        rows.append(("oracle (ceiling)", [_figure(run.oracle.get(metric)) for metric in METRICS]))
    return rows


def _split_and_step(run: Run) -> tuple[str, int]:
    record = next(iter(run.results.values()))
    return {"valid": "validation"}.get(record.get("split", ""), record.get("split", "")), record.get("step", 0)


def _page(run: Run) -> str:
    name = run.folder.resolve().name
    sections = [
        _header(run, name),
        _warnings(run),
        _results_section(run),
        _curves(run),
        experts_section(run.of_kind("experts")),
        insight_section(_first([*run.results.values()]).get("insight", {})),
        _parameters(run),
        _setup(run),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · Fuxi-MME</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _header(run: Run, name: str) -> str:
    model, info = run.config.model, _first(run.of_kind("run"))
    experts = f"{model.moe.num_experts} experts (top {model.moe.top_k})" if model.moe.num_experts else "dense FFN"
    kind = {"fuxi": "blocks, " + experts, "hstu": "HSTU blocks", "sasrec": "SASRec blocks"}[model.block]
    shape = f"M = {model.num_tables} tables, D = {model.embedding_dim}, {model.num_blocks} {kind}"
    processes = info.get("world_size")
    where = [
        str(info.get("time", ""))[:16].replace("T", " "),
        str(info.get("device", "")),
        f"{processes} process{'es' if processes != 1 else ''}" if processes else "",
    ]
    place = " · ".join(escape(part) for part in where if part)
    tiles = "".join(
        f"<div class='tile'><span>{escape(label)}</span><b>{escape(value)}</b></div>"
        for label, value in _tiles(run, info)
    )
    return f"<header><h1>{escape(name)}</h1><p>{escape(shape)}<br>{place}</p><div class='tiles'>{tiles}</div></header>"


def _tiles(run: Run, info: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    if run.results:
        record, baseline = next(iter(run.results.values())), run.results.get("popularity", {})
        for metric in ("ndcg@10", "hr@10"):
            if record.get(metric) is not None:
                tiles.append((f"{_split_and_step(run)[0]} {metric.upper()}", _figure(record[metric])))
        if record is not baseline and baseline.get("ndcg@10"):
            tiles.append(("times popularity", _ratio(record.get("ndcg@10"), baseline["ndcg@10"])))
    train = run.of_kind("train")
    if train:
        rates = sorted(record["tokens_per_s"] for record in train if record.get("tokens_per_s") is not None)
        if rates:
            tiles.append(("tokens/s, median", _count(rates[len(rates) // 2])))
        tiles.append(("steps", f"{train[-1]['step']:,}"))
        tiles.append(("time in steps", duration(_training_s(train))))
    if isinstance(info.get("parameters"), dict):
        tiles.append(("parameters", _count(sum(info["parameters"].values()))))
    return tiles


def _training_s(train: Sequence[dict[str, Any]]) -> float:
    before = [0, *(record["step"] for record in train)]
    return sum((r["step"] - b) * r.get("step_ms", 0.0) for r, b in zip(train, before, strict=False)) / 1000


def _warnings(run: Run) -> str:
    found = expert_warnings(_last(run.of_kind("experts")), run.config.model.moe.top_k)
    lost = [record["step"] for record in run.of_kind("train") if record.get("loss") is None]
    if lost:
        found.append(f"The loss was not finite at step {lost[0]:,}.")
    if not run.results:
        found.append("No evaluation was recorded: the run ended before its first one.")
    if not found:
        return ""
    listed = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f"<section class='warn'><h2>Warnings</h2><ul>{listed}</ul></section>"


def _results_section(run: Run) -> str:
    if not run.results:
        return ""
    record = next(iter(run.results.values()))
    split, step = _split_and_step(run)
    head = "".join(f"<th>{metric.upper()}</th>" for metric in METRICS)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, values in _result_rows(run)
    )
    facts = [
        f"Metrics of the checkpoint of step {step:,} on the {split} split",
        f"protocol <code>{escape(str(record.get('protocol')))}</code>",
        f"{record['users']:,} users" if "users" in record else "",
        f"order of events: {escape(str(record['sort_rule']))}" if "sort_rule" in record else "",
        f"targets <code title='SHA-256'>{escape(str(record.get('targets_sha256')))}</code>",
    ]
    note = (
        "The oracle knows the process that generated the data: no model can do better on average." if run.oracle else ""
    )
    return (
        "<section><h2>Results</h2><div class='scroll'>"
        f"<table class='results'><tr><th></th>{head}</tr>{body}</table></div>"
        f"<p class='note'>{'; '.join(fact for fact in facts if fact)}. "
        f"Every item is ranked but those the user has seen. {note}</p></section>"
    )


def _curves(run: Run) -> str:
    train = run.of_kind("train")
    loss = _points(train, "loss")
    charts = [
        line_chart(
            [Line("each line of metrics", loss, faint=True), Line("smoothed", smoothed(loss))], title="Training loss"
        )
    ]
    valid = [record for record in run.of_kind("eval") if record.get("split") == "valid"]
    for metric in ("ndcg@10", "hr@10"):
        lines = []
        for colour, model in enumerate(sorted({r["model"] for r in valid}, key=lambda name: name == "popularity")):
            points = _points([record for record in valid if record["model"] == model], metric)
            lines.append(Line(model, points, marked=True, colour=colour))
        charts.append(line_chart(lines, title=f"Validation {metric.upper()}", from_zero=True))
    rate = _points(train, "tokens_per_s")
    charts.append(line_chart([Line("tokens/s", rate, colour=2)], title="Throughput, tokens/s", from_zero=True))
    waits = [
        Line(label, _points(train, key), colour=colour)
        for colour, (key, label) in enumerate(
            {
                "wait_ms": "waiting in collectives, mean of the ranks",
                "straggler_ms": "the slowest rank beyond the mean",
            }.items()
        )
    ]
    charts.append(line_chart(waits, title="Of a step, ms", from_zero=True))
    drawn = "".join(chart for chart in charts if chart)
    return f"<section><h2>Training</h2><div class='charts'>{drawn}</div></section>" if drawn else ""


def _parameters(run: Run) -> str:
    parameters = _first(run.of_kind("run")).get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        return ""
    total = sum(parameters.values()) or 1
    body = "".join(
        f"<tr><th>{escape(part)}</th><td>{count:,}</td><td>{count / total:.1%}</td></tr>"
        for part, count in parameters.items()
    )
    return (
        f"<section><h2>Parameters</h2><table>{body}<tr><th>total</th><td>{total:,}</td><td></td></tr></table></section>"
    )


def _setup(run: Run) -> str:
    runs = run.of_kind("run")
    info = _last(runs)
    facts = {**{k: v for k, v in run.dataset.items() if isinstance(v, (str, int)) and k != "format"}}
    tables = [("Data set", {"path": run.config.data.path, **facts}), ("Versions", info.get("versions", {}))]
    shown = "".join(_facts(title, values) for title, values in tables if values)
    restarts = f"<p class='note'>Went on from a checkpoint {len(runs) - 1} times.</p>" if len(runs) > 1 else ""
    command = f"mme train --config {run.folder / 'config.yaml'} output_dir={run.folder}-again"
    if info.get("world_size", 1) > 1:
        command = f"torchrun --nproc-per-node {info['world_size']} -m {command}"
    return (
        f"<section><h2>Setup</h2>{restarts}<div class='columns'>{shown}</div></section>"
        f"<section><h2>Reproduce</h2><pre>{escape(command)}</pre>"
        f"<details><summary>Configuration</summary><pre>{escape(run.config_text)}</pre></details></section>"
    )


def _facts(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{f'{value:,}' if isinstance(value, int) else escape(str(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<div><h3>{escape(title)}</h3><table class='facts'>{rows}</table></div>"


def _points(records: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _first(records: list[dict[str, Any]]) -> dict[str, Any]:
    return records[0] if records else {}


def _last(records: list[dict[str, Any]]) -> dict[str, Any]:
    return records[-1] if records else {}


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _ratio(value: float | None, beside: float | None) -> str:
    return f"{value / beside:.1f}×" if value is not None and beside else "–"


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}"
