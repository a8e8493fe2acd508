"""Reads a run's folder: its records, its test results beside the baseline, and warnings about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mme.config import CONFIG_FILE, Config, load_saved_config
from mme.errors import UserError, one_line
from mme.evaluation.record import METRICS, POPULARITY, SELECTED_BY, repeats_warning
from mme.files import read_json, read_text
from mme.run.metrics_file import METRICS_FILE, read_metrics

Z_95 = 1.96  # standard errors in half a 95% confidence interval of a normal distribution


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's folder.

    Attributes:
        results: the last record of each model on the test split, or on the validation split if there was no test; the
            trained model comes first.
        oracle: for a generated data set, the value of each metric that knowledge of the true process reaches.
    """

    folder: Path
    config: Config
    config_text: str
    records: list[dict[str, Any]]
    dataset: dict[str, Any]
    results: dict[str, dict[str, Any]]
    oracle: dict[str, float]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """The trained model's name in the records; empty if it was not evaluated."""
        return next((name for name in self.results if name != POPULARITY), "")

    @property
    def result(self) -> dict[str, Any]:
        """The trained model's record; empty if it was not evaluated."""
        return self.results.get(self.model, {})

    @property
    def baseline(self) -> dict[str, Any]:
        return self.results.get(POPULARITY, {})

    @property
    def split(self) -> str:
        """The split of the results, in words."""
        split = str(next(iter(self.results.values()), {}).get("split", ""))
        return {"valid": "validation"}.get(split, split)

    @property
    def step(self) -> int:
        """The step of the checkpoint that the results belong to."""
        return next(iter(self.results.values()), {}).get("step", 0)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def read_run(folder: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
        UserError: the folder does not exist, or one of its files is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder (`mme train` makes it, as output_dir)")
    records = read_metrics(folder / METRICS_FILE)
    if not records:
        raise UserError(f"{folder / METRICS_FILE}: empty, expected the metrics of a run made by `mme train`")
    config = load_saved_config(folder)
    dataset = _dataset_info(Path(config.data.path))
    results = _results(records)
    oracle = _oracle(dataset, next(iter(results.values()), {}))
    return RunFiles(folder, config, read_text(folder / CONFIG_FILE, folder), records, dataset, results, oracle)


def result_rows(run: RunFiles, *, intervals: bool = True) -> list[tuple[str, list[str]]]:
    """Rows (name, one text per metric) for each model, the model's lift over popularity, and the oracle.

    Args:
        intervals: add recorded confidence intervals.
    """
    rows = [
        (name, [figure(record if intervals else {metric: record.get(metric)}, metric) for metric in METRICS])
        for name, record in run.results.items()
    ]
    if run.result and run.baseline:
        rows.append(("times popularity", [ratio(run.result.get(m), run.baseline.get(m)) for m in METRICS]))
    if run.oracle:
        rows.append(("oracle (ceiling)", [figure(run.oracle, metric) for metric in METRICS]))
    return rows


def results_table(run: RunFiles) -> Table | None:
    """The table of `result_rows` for a terminal, without intervals so that it fits 80 columns; None without results."""
    if not run.results:
        return None
    title = f"{run.folder}: {run.split} metrics at step {run.step:,}"
    table = Table(title=escape(one_line(title)), title_justify="left")
    table.add_column("")
    for metric in METRICS:
        table.add_column(metric.upper(), justify="right")
    for name, values in result_rows(run, intervals=False):
        table.add_row(escape(one_line(name)), *values, style="bold" if name == run.model else None)
    return table


def below_popularity(run: RunFiles) -> str | None:
    """A warning about a model that is worse than the baseline; None otherwise."""
    reached, baseline = run.result.get(SELECTED_BY), run.baseline.get(SELECTED_BY)
    if reached is None or baseline is None or reached >= baseline:
        return None
    return (
        f"{run.model} is worse than popularity: {run.split} {SELECTED_BY.upper()} {reached:.4f}, popularity {baseline:.4f}. "
        "Do not use its recommendations: train longer, or change train.lr and the model."
    )


def repeats(run: RunFiles) -> str | None:
    """See `mme.evaluation.record.repeats_warning`."""
    return repeats_warning(next(iter(run.results.values()), {}))


def figure(record: dict[str, Any], metric: str) -> str:
    """A metric to four places, with half its 95% confidence interval if its standard error is recorded."""
    value, error = record.get(metric), record.get("standard_errors", {}).get(metric)
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {Z_95 * error:.4f}"


def ratio(value: float | None, baseline: float | None) -> str:
    return f"{value / baseline:.1f}×" if value is not None and baseline else "–"


def _results(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    evaluations = [record for record in records if record["kind"] == "eval" and record.get("model")]
    tested = [record for record in evaluations if record.get("split") == "test"]
    latest = {record["model"]: record for record in tested or evaluations}
    return dict(sorted(latest.items(), key=lambda item: item[0] == POPULARITY))


def _dataset_info(path: Path) -> dict[str, Any]:
    try:
        info = read_json(path / "dataset.json", path)
    except (OSError, ValueError):  # the data set may have been moved, removed or replaced; the report leaves it out
        return {}
    return info if isinstance(info, dict) else {}


def _oracle(dataset: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """The oracle's metrics on the targets of ``result``, if the generated data set states them."""
    by_split = dataset.get("oracle")
    if result.get("protocol") != "leave_two_out" or not isinstance(by_split, dict):
        return {}
    known = by_split.get(result.get("split"))
    if not isinstance(known, dict):
        return {}
    return {metric: value for metric, value in known.items() if metric in METRICS and isinstance(value, (int, float))}
