"""The command ``mme tune``: its options and its final table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mme.errors import UserError, one_line
from mme.run.exit_status import job_status

# typer reads these annotations at run time; on Python 3.10 it needs Optional[X] for a value that may be missing.
# ruff: noqa: UP045

SHOWN_TRIALS = 20


def tune(
    config: Annotated[Path, typer.Option(metavar="FILE", help="YAML configuration that all trials share.")],
    space: Annotated[
        Path, typer.Option(metavar="FILE", help="YAML search space: keys with bounds or lists of values.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the search: journal, trials, best.yaml.")],
    trials: Annotated[int, typer.Option(min=1, help="Total number of trials, including those of earlier starts.")] = 20,
    metric: Annotated[str, typer.Option(help="Metric on the validation split to maximise.")] = "ndcg@10",
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent trials.")] = 1,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Processes per trial.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the proposals; trials keep train.seed.")] = 0,
    prune: Annotated[bool, typer.Option(help="Stop trials that are below the median of the others.")] = True,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="KEY.PATH=VALUE", help="Override values of the file.")
    ] = None,
) -> None:
    """Search hyper-parameters by training. The protocol must have a validation split.

    The same command resumes a search that was stopped: finished trials count, and a trial that was running resumes from its
    checkpoint. The command writes the best trial's configuration to best.yaml and all trials to trials.json.

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
            raise UserError(f"{output}: no trial completed an evaluation; trials.json gives the reasons")
        _show(metric, result.rows)
        print(f"best {metric} {result.best:.4f}: {output / 'best.yaml'}")


def _show(metric: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("trial", "state", metric, "values")
    for row in sorted(rows, key=lambda row: row[metric] or -1.0, reverse=True)[:SHOWN_TRIALS]:
        values = "  ".join(f"{key}={value}" for key, value in row["values"].items())
        value = "–" if row[metric] is None else f"{row[metric]:.4f}"
        table.add_row(row["trial"], row["state"], value, escape(one_line(values)))
    Console().print(table)
