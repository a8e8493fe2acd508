"""The ``mme`` command parses arguments, calls a function below, and turns errors into one line and an exit status.

Exit status: 0 on success; 1 if the job failed; 2 if the input or the configuration is wrong; 130 if interrupted.
Commands import what they need inside their functions, so that ``--help`` and wrong arguments are answered immediately.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from mme import __version__
from mme.errors import UserError, one_line, print_line
from mme.inference.command import export
from mme.installation import prepare_training
from mme.prepare.command import prepare
from mme.run.exit_status import job_status, print_error, rank, warn_of
from mme.serve.command import serve
from mme.tune.command import tune

# typer reads the annotations at run time.
# ruff: noqa: UP045

app = typer.Typer(name="mme", add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")

RunOption = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Folder of a run: the output_dir of `mme train`.")
]


class TableFormat(str, Enum):
    """How `mme compare` writes its tables."""

    markdown = "markdown"
    csv = "csv"
    latex = "latex"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's own) and returns the exit status."""
    _quiet_libraries()
    command = typer.main.get_command(app)
    try:
        status = command.main(
            args=None if arguments is None else list(arguments), prog_name="mme", standalone_mode=False
        )
    except typer.TyperException as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        if message and rank() == 0:  # empty when the command line has no arguments: typer has printed the help already
            print_error(f"{message} (see `{_command_name(arguments)} --help`)")
        return error.exit_code
    except typer.Abort:
        return 1
    return status if isinstance(status, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mme {__version__}")
        raise typer.Exit


@app.callback()
def mme(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fuxi-MME, a sequential recommender: prepare interactions, train, evaluate, recommend.

    A first run:

        mme prepare --synthetic quickstart --output datasets/quickstart

        mme train --config configs/quickstart.yaml

        mme evaluate --run runs/quickstart
    """


app.command(no_args_is_help=True)(prepare)
app.command(no_args_is_help=True)(tune)


@app.command(no_args_is_help=True)
def train(
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="YAML configuration; docs/configuration.md lists every key.")
    ],
    overrides: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="KEY.PATH=VALUE", help="Override values of the file, such as train.lr=0.002."),
    ] = None,
) -> None:
    """Train a model, evaluate it and write the report.

    The command runs in one process, or as a worker under torchrun. It writes config.yaml, metrics.jsonl, checkpoints,
    TensorBoard files, log.txt and report.html to the run's folder (output_dir). If it is started again with the same
    output_dir, the run resumes from its newest complete checkpoint; with train.resume=false it starts from step 0.

    Examples:

        mme train --config configs/quickstart.yaml

        mme train --config configs/quickstart.yaml train.seed=2 output_dir=runs/second-seed

        torchrun --nproc-per-node 2 -m mme train --config configs/quickstart.yaml
    """
    with job_status() as job:
        from mme.config import load_config, validate_world_size

        settings = load_config(config, overrides)
        validate_world_size(settings, int(os.environ.get("WORLD_SIZE", "1")))
        job.folder = Path(settings.output_dir)
        prepare_training()
        from mme.training import train as train_model

        train_model(settings)
        if rank() == 0:
            _print_results(job.folder)


@app.command(no_args_is_help=True)
def evaluate(
    run: RunOption,
    checkpoint: Annotated[
        Optional[int], typer.Option(metavar="STEP", min=0, help="Step of the checkpoint. Default: the best one.")
    ] = None,
    save_ranks: Annotated[
        bool,
        typer.Option("--save-ranks", help="Save each user's rank in the run's folder, for `mme compare`."),
    ] = False,
    seen: Annotated[
        Optional[Literal["exclude", "include"]],
        typer.Option(
            help="Include or exclude items of the user's history in the ranking. Default: the run's eval.seen."
        ),
    ] = None,
    cache_dir: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            help="Folder for the flat file of the data set's events, if the data set's own folder can't be written to. The "
            "run's data.cache_dir is not used.",
        ),
    ] = None,
) -> None:
    """Print the test metrics of a run's checkpoint as JSON.

    Only the JSON goes to standard output. All other messages go to standard error.

    Examples:

        mme evaluate --run runs/quickstart

        mme evaluate --run runs/quickstart --checkpoint 400 > metrics.json
    """
    with job_status() as job, _standard_output_to_error() as output:
        job.folder = _run_folder(run)
        prepare_training()
        from mme.evaluation.evaluate import evaluate_run

        metrics = evaluate_run(run, checkpoint, seen, save_ranks=save_ranks, cache_dir=cache_dir)
        if rank() == 0:
            os.write(output, (json.dumps(metrics, indent=2) + "\n").encode())


@app.command(no_args_is_help=True)
def recommend(
    run: RunOption,
    users: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Parquet file of histories, one row per user: user_id, item_ids (as in the raw data, oldest first), "
            "timestamps (seconds) and optionally request_timestamp, the time of the recommendation.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Parquet file to write: user_id, item_ids, scores, fallback.")
    ],
    top_k: Annotated[int, typer.Option(min=1, help="Items to recommend for each history.")] = 10,
    seen: Annotated[
        Optional[Literal["exclude", "include"]],
        typer.Option(help="Include or exclude items of the history in the lists. Default: the run's eval.seen."),
    ] = None,
    unknown: Annotated[
        Literal["skip", "refuse"],
        typer.Option(
            help="Events of items that are not in the training data: skip ignores them, refuse exits with status 2."
        ),
    ] = "skip",
    request_time: Annotated[
        Optional[Literal["now", "last", "column"]],
        typer.Option(
            help="Time of the recommendation: now, the history's last event, or the column request_timestamp, in which null "
            "means the last event. Default: the column if the file has it, otherwise the last event."
        ),
    ] = None,
) -> None:
    """Recommend the items with the highest scores for each history.

    Items of the history are excluded, unless you give --seen include or the run has eval.seen=include. A history without
    any known item gets the most popular items, and its fallback is true.

    The model uses how long ago each event was, so the time of the request matters. Evaluation uses the time of the event
    to be predicted, which is unknown in production; pass the time of the request if you have it.

    Examples:

        mme recommend --run runs/quickstart --users histories.parquet --top-k 20 --output top.parquet

        mme recommend --run runs/quickstart --users histories.parquet --request-time now --output top.parquet
    """
    with job_status() as job:
        job.folder = _run_folder(run)
        prepare_training()
        from mme.evaluation.recommend import Options
        from mme.evaluation.recommend import recommend as recommend_items

        summary = recommend_items(run, users, output, Options(top_k, seen, unknown, request_time))
        if rank() == 0:
            for line in summary.notes():
                print_line(line)
            print_line(f"wrote {output}", sys.stdout)


@app.command(no_args_is_help=True)
def report(
    runs: Annotated[
        Optional[list[Path]],
        typer.Argument(metavar="[DIR]...", help="Folders of runs. Several are shown side by side.", show_default=False),
    ] = None,
    run: Annotated[
        Optional[list[Path]],
        typer.Option("--run", metavar="DIR", help="Folder of a run, like DIR; can be repeated.", show_default=False),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="HTML file to write. Default for one run: report.html in its folder."),
    ] = None,
) -> None:
    """Write the report of a run, or of several side by side, as one HTML file that works offline.

    The report shows results, curves, expert load and configuration. `mme train` writes it when it ends; use this command
    for a run that is still in progress or was interrupted, and to compare runs.

    Examples:

        mme report --run runs/quickstart

        mme report runs/first runs/second --output both.html
    """
    with job_status() as job:
        folders = [*(run or []), *(runs or [])]
        if not folders:
            raise UserError("no run given: expected --run DIR (see `mme report --help`)")
        if len(folders) > 1 and output is None:
            raise UserError("several runs: expected --output FILE for the combined report")
        for folder in folders:
            _run_folder(folder)
        from mme.report.page import write_compared_report, write_report

        if len(folders) == 1:
            job.folder = folders[0]
            print_line(f"wrote {write_report(folders[0], output)}", sys.stdout)
        else:
            assert output is not None
            print_line(f"wrote {write_compared_report(folders, output)}", sys.stdout)


@app.command(no_args_is_help=True)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR...", help="Folders of runs; the first is the baseline.")
    ],
    output_format: Annotated[
        TableFormat, typer.Option("--format", help="Format of the tables.")
    ] = TableFormat.markdown,
    output: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="File to write. Default: standard output.", show_default=False),
    ] = None,
) -> None:
    """Compare the test results of runs user by user.

    The tables show each metric with its 95% confidence interval over users, the difference of NDCG@10 from the first run
    with a paired test and Holm's correction, NDCG@10 by popularity of the target and by length of the history, and the
    coverage, novelty and diversity of the lists. All runs must have been evaluated on the same targets.

    Examples:

        mme compare runs/fuxi runs/sasrec

        mme compare runs/fuxi runs/sasrec --format latex --output table.tex
    """
    with job_status():
        if len(runs) < 2:
            raise UserError(f"{runs[0]}: one run: expected at least two to compare")
        for run in runs:
            _run_folder(run)
        from mme.files import write_text
        from mme.report.compare import FORMATS
        from mme.report.compare import compare as compare_runs

        text = FORMATS[output_format.value](compare_runs(runs))
        if output is None:
            print(text, end="")
        else:
            if not output.parent.is_dir() or output.is_dir():
                raise UserError(f"--output {output}: expected a file in an existing folder")
            write_text(output, text)
            print_line(f"wrote {output}", sys.stdout)


def _command_name(arguments: Sequence[str] | None) -> str:
    words = list(sys.argv[1:] if arguments is None else arguments)
    return f"mme {words[0]}" if words and words[0] in {command.callback.__name__ for command in _commands()} else "mme"


def _commands() -> list[Any]:
    return [command for command in app.registered_commands if command.callback is not None]


def _run_folder(run: Path) -> Path:
    from mme.config import CONFIG_FILE

    if not run.is_dir():
        raise UserError(f"{run}: no such run folder (`mme train` makes it, as output_dir)")
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run}: has no {CONFIG_FILE}, expected a run's folder made by `mme train`")
    return run


app.command(no_args_is_help=True)(export)
app.command(no_args_is_help=True)(serve)


def _quiet_libraries() -> None:
    """Keeps warnings of libraries off the terminal. Once a run has its log.txt, they go there (`mme.run.monitor`)."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.captureWarnings(True)
    # Without a handler, Python would print the warnings to the terminal.
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@contextmanager
def _standard_output_to_error() -> Iterator[int]:
    """Redirects standard output, also of C libraries, to standard error; yields a descriptor of the original output."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield output
    finally:
        sys.stdout.flush()
        os.dup2(output, 1)
        os.close(output)


def _print_results(run: Path) -> None:
    """Prints the results, a warning if they are worse than the baseline, and the path of the report.


    A report that cannot be written is only a warning, because the job is done and must not be restarted.
    """
    try:
        from rich.console import Console

        from mme.report.results import below_popularity, read_run, results_table

        result = read_run(run)
        table = results_table(result)
        console = Console()
        if table is not None:
            console.print(table)
        if warning := below_popularity(result):
            console.print(
                one_line(f"warning: {warning}"), style="yellow", markup=False, highlight=False, soft_wrap=True
            )

        from mme.report.page import write_report

        console.print(one_line(f"report: {write_report(run)}"), markup=False, highlight=False, soft_wrap=True)
    except Exception as error:
        warn_of(error, run, f"training is done, but its report failed; `mme report --run {run}` writes it")
