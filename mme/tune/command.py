"""The command ``mme tune``: its options, and the table that it ends with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mme.errors import UserError
from mme.run.exit_status import job_status

# typer reads the annotations and Python 3.10 shows Optional[X] and X | None to it alike.
# ruff: noqa: UP045

SHOWN_TRIALS = 20


def tune(
    config: Annotated[Path, typer.Option(metavar="FILE", help="YAML configuration that all trials share.")],
    space: Annotated[
        Path, typer.Option(metavar="FILE", help="YAML search space: keys with bounds or lists of values.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the search: journal, trials, best.yaml.")],
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, those of earlier starts included.")] = 20,
    metric: Annotated[str, typer.Option(help="Metric of the validation split that is maximised.")] = "ndcg@10",
    jobs: Annotated[int, typer.Option(min=1, help="Trials at the same time.")] = 1,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Processes of each trial.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the proposals; trials keep train.seed.")] = 0,
    prune: Annotated[bool, typer.Option(help="Stop trials that lag behind the median of the others.")] = True,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="KEY.PATH=VALUE", help="Values that replace those of the file.")
    ] = None,
) -> None:
    """Search hyper-parameters by training; needs a protocol with a validation split.

    A search that was stopped resumes with the same command: finished trials count, and a trial that was running resumes from
    its checkpoint. The best trial's configuration is written to best.yaml, all trials to trials.json.

    Example:

        mme tune --config configs/quickstart.yaml --space space.yaml --trials 16 --output runs/tune
    """
    with job_status():
        if importlib.util.find_spec("optuna") is None:
            raise UserError("mme tune needs Optuna, which is not installed: `pip install 'mme[tune]'`")
        from mme.tune.study import Search
        from mme.tune.study import tune as run_search

        search = Search(config, space, output, list(overrides or []), trials, metric, jobs, nproc_per_node, seed, prune)
        try:
            result = run_search(search)
        except InterruptedError as error:
            raise KeyboardInterrupt from error
        if result.best is None:
            raise UserError(f"{output}: no trial has come to an evaluation; trials.json says why")
        _show(metric, result.rows)
        print(f"best {metric} {result.best:.4f}: {output / 'best.yaml'}")


def _show(metric: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("trial", "state", metric, "values")
    for row in sorted(rows, key=lambda row: row[metric] or -1.0, reverse=True)[:SHOWN_TRIALS]:
        values = "  ".join(f"{key}={value}" for key, value in row["values"].items())
        table.add_row(row["trial"], row["state"], "–" if row[metric] is None else f"{row[metric]:.4f}", values)
    Console().print(table)
