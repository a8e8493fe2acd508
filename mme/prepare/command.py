"""The command ``mme prepare``: its options, and the summary of the training set that it prints."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from mme.errors import UserError, one_line
from mme.paths import local_path, remote_url
from mme.run.exit_status import job_status

# typer reads the annotations, and Python 3.10 shows it Optional[X] for both spellings.
# ruff: noqa: UP045

# Count in dataset.json → its label in the summary, in the order shown.
PREPARED_LABELS = {
    "rows_read": "rows read",
    "malformed_rows": "malformed rows left out",
    "unwanted_rows": "rows left out, without the feedback asked for",
    "duplicate_rows": "duplicate rows left out",
    "users_dropped": "users dropped, too few events",
    "items_dropped": "items dropped, too few events",
    "events_dropped": "events dropped with them",
    "num_users": "users kept",
    "num_items": "items kept",
    "num_events": "events kept",
}


def prepare(
    output: Annotated[
        Optional[str],
        typer.Option(metavar="DIR", help="Folder to write the training set to, local or in an object store (s3://…)."),
    ] = None,
    add_to: Annotated[
        Optional[str],
        typer.Option(metavar="DIR", help="Instead of --output: a training set to add the new events to, in place."),
    ] = None,
    inputs: Annotated[
        Optional[list[str]],
        typer.Option(
            "--input",
            metavar="FILE",
            help="File of interactions, folder or pattern, local or s3://…, gs://…, abfs://…, hdfs://…; can be repeated and "
            "can take several values.",
        ),
    ] = None,
    more_inputs: Annotated[Optional[list[str]], typer.Argument(metavar="FILE", hidden=True)] = None,
    format: Annotated[
        Optional[str],
        typer.Option(
            help="Format of the files: parquet, arrow, csv, json, movielens-1m, movielens-20m (also 25m, 32m), kuairand, "
            "kuairec, amazon, or auto (the default) to recognise it."
        ),
    ] = None,
    user_column: Annotated[Optional[str], typer.Option(help="Column of users: its name, or its number from 1.")] = None,
    item_column: Annotated[Optional[str], typer.Option(help="Column of items, likewise.")] = None,
    timestamp_column: Annotated[Optional[str], typer.Option(help="Column of times, likewise.")] = None,
    header: Annotated[
        Optional[bool],
        typer.Option("--header/--no-header", help="Whether the first line of a CSV file names the columns."),
    ] = None,
    quoting: Annotated[
        Optional[str],
        typer.Option(
            help='What " means in CSV: standard (encloses fields), literal (a character like others) or auto (the default: '
            "encloses fields if it is closed properly)."
        ),
    ] = None,
    time_unit: Annotated[
        Optional[str],
        typer.Option(
            help="Unit of times that are numbers: s, ms, us, ns, iso (20210403) or auto (the default: by their size)."
        ),
    ] = None,
    id_type: Annotated[
        Optional[str],
        typer.Option(help="Type of ids: integer, text or auto (the default: integer if they are whole numbers)."),
    ] = None,
    rating_column: Annotated[Optional[str], typer.Option(help="Name of the column of ratings.")] = None,
    click_column: Annotated[Optional[str], typer.Option(help="Name of the column of clicks, 0 or 1.")] = None,
    watch_time_column: Annotated[
        Optional[str], typer.Option(help="Name of the column of times watched, in ms if the name ends in _ms.")
    ] = None,
    watch_ratio_column: Annotated[
        Optional[str], typer.Option(help="Name of the column of the shares of the videos watched.")
    ] = None,
    min_rating: Annotated[Optional[float], typer.Option(help="Leave out events with a lower rating.")] = None,
    clicks_only: Annotated[
        Optional[bool],
        typer.Option("--clicks-only/--all-impressions", help="Leave out events without a click; default for kuairand."),
    ] = None,
    min_watch_time: Annotated[Optional[float], typer.Option(help="Leave out events watched for fewer seconds.")] = None,
    min_watch_ratio: Annotated[
        Optional[float], typer.Option(help="Leave out events with a smaller watched share.")
    ] = None,
    min_user_events: Annotated[
        Optional[int], typer.Option(min=1, help="Drop users with fewer events; default 3.")
    ] = None,
    min_item_events: Annotated[
        Optional[int], typer.Option(min=1, help="Drop items with fewer events; default 1.")
    ] = None,
    filter_once: Annotated[
        Optional[bool],
        typer.Option(
            "--filter-once", help="Filter users and items once, not repeatedly until all remaining ones have enough."
        ),
    ] = None,
    feature_columns: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAMES",
            help="Further columns to keep, separated by commas, such as action,price:number. A column holds categories "
            "unless its name ends with :number. The model reads the columns in model.event_features and "
            "model.user_features.",
        ),
    ] = None,
    memory_limit: Annotated[Optional[str], typer.Option(help="Upper limit of memory; default 4GiB.")] = None,
    max_malformed_share: Annotated[
        Optional[float],
        typer.Option(min=0, max=1, help="Largest share of malformed rows; default 0.01. Input with more is rejected."),
    ] = None,
    synthetic: Annotated[
        Optional[str],
        typer.Option(metavar="NAME", help="Instead of files: the embedded generator, such as quickstart."),
    ] = None,
    users: Annotated[Optional[int], typer.Option(min=1, help="With --synthetic: how many users; default 3000.")] = None,
    items: Annotated[
        Optional[str],
        typer.Option(
            metavar="FILE",
            help="File with one row per item: its id, its title and attributes, as CSV, JSON lines, Parquet or Arrow. With "
            "--synthetic: how many items; default 2000.",
        ),
    ] = None,
    title_column: Annotated[
        Optional[str], typer.Option(help="Column of titles in the file of --items: its name, or its number from 1.")
    ] = None,
    item_id_column: Annotated[
        Optional[str], typer.Option(help="Column of item ids in the file of --items, likewise.")
    ] = None,
    item_attributes: Annotated[
        Optional[str],
        typer.Option(metavar="NAMES", help="Further columns of that file to keep, separated by commas, such as brand."),
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="With --synthetic: seed of the generator; default 0.")] = None,
) -> None:
    """Turn raw interactions into a training set.

    The output folder gets Parquet files with one row per user (user_id, item_ids, timestamps), and dataset.json with the
    counts, the sort rule and the id maps. With --add-to, new events join an existing training set: users keep their rows,
    items their indices, and only the parts that the events touch are rewritten.

    Examples:

        mme prepare --input ratings.csv --output datasets/ml-20m

        mme prepare --input day1.parquet day2.parquet --user-column uid --output datasets/mine

        mme prepare log.tsv --no-header --user-column 1 --item-column 2 --timestamp-column 4 --output datasets/mine

        mme prepare ratings.csv --items movies.csv --item-attributes genres --output datasets/mine

        mme prepare log.csv --feature-columns action,segment --output datasets/mine

        mme prepare day3.parquet --add-to datasets/mine

        mme prepare --synthetic quickstart --output datasets/quickstart
    """
    with job_status():
        of_items = {"title_column": title_column, "item_id_column": item_id_column, "item_attributes": item_attributes}
        generator: dict[str, Any] = {"users": users, "seed": seed}
        columns = {
            "user_column": user_column,
            "item_column": item_column,
            "timestamp_column": timestamp_column,
            "rating_column": rating_column,
            "click_column": click_column,
            "watch_time_column": watch_time_column,
            "watch_ratio_column": watch_ratio_column,
        }
        reading = {
            "format": format,
            "header": header,
            "quoting": quoting,
            "time_unit": time_unit,
            "id_type": id_type,
        }
        filters: dict[str, Any] = {
            "min_rating": min_rating,
            "clicks_only": clicks_only,
            "min_watch_time": min_watch_time,
            "min_watch_ratio": min_watch_ratio,
            "min_user_events": min_user_events,
            "min_item_events": min_item_events,
            "filter_once": filter_once,
            "feature_columns": feature_columns,
        }
        limits: dict[str, Any] = {
            "memory_limit": memory_limit,
            "max_malformed_share": max_malformed_share,
        }
        files = [*(inputs or []), *(more_inputs or [])]
        given_files = {"input": files} if files else {}
        target = output or add_to
        if target is None or (output and add_to):
            raise UserError("mme prepare needs either --output or --add-to (see `mme prepare --help`)")
        if synthetic is not None:
            options = {**columns, **filters, **limits, **reading, **of_items, "add_to": add_to}
            _refuse(given_files | _given(options), "--synthetic")
            if remote_url(target) is None:
                local_path(target, "--output")
            from mme.prepare.synthetic import prepare_synthetic

            generator["items"] = None if items is None else _count(items)
            _print_prepared(prepare_synthetic(synthetic, target, **_given(generator)), target)
            return
        if not files:
            raise UserError("mme prepare needs --input or --synthetic (see `mme prepare --help`)")
        _refuse(_given(generator), "--input")
        names = {option.removesuffix("_column"): name for option, name in columns.items()}
        from mme.prepare.item_table import ItemOptions
        from mme.prepare.pipeline import add_events
        from mme.prepare.pipeline import prepare as prepare_files

        limits["items"] = None
        if items is None:
            _refuse(_given(of_items), "a command without --items")
        else:
            attributes = _names(item_attributes or "")
            limits["items"] = ItemOptions(items, item_id_column, title_column, attributes)
        if add_to:
            _refuse(_given(filters), "--add-to, for the set keeps its own filters and columns,")
            info = add_events(files, add_to, columns=names, tell=_tell, **_given(limits | reading))
        else:
            if feature_columns is not None:
                filters["feature_columns"] = _names(feature_columns)
            reading["format"] = format or "auto"
            info = prepare_files(files, output=target, columns=names, tell=_tell, **_given(filters | limits | reading))
        _print_prepared(info, target)


def _names(text: str) -> list[str]:
    """The names in a list that is separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) < 2**31:
        raise UserError(f"--items {text}: expected with --synthetic the number of items, from 1")
    return int(text)


def _tell(text: str) -> None:
    print(text, flush=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], beside: str) -> None:
    if options:
        name = next(iter(options)).replace("_", "-")
        raise UserError(f"--{name} does not go with {beside} (see `mme prepare --help`)")


def _print_prepared(info: dict[str, Any], output: str) -> None:
    """Prints what was read, left out and kept; ``info`` is the content of dataset.json."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    runs = info.get("runs", [])
    added = f", {len(runs) - 1} additions" if len(runs) > 1 else ""
    table = Table(title=escape(one_line(f"{output}{added}")), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, label in PREPARED_LABELS.items():
        if name in info:
            table.add_row(label, f"{info[name]:,}")
        if name == "malformed_rows":
            for reason, found in info.get("malformed", {}).items():
                table.add_row(escape(one_line(f"  {reason} (first: {found['first'][0]})")), f"{found['rows']:,}")
    for name, number in info.get("features", {}).items():
        table.add_row(escape(one_line(f"values of {name}")), f"{number:,}")
    if runs and (found := runs[-1].get("items")):
        first = f" (first: {', '.join(found['first_unknown'])})" if found["unknown_ids"] else ""
        table.add_row("items without a row in the file of items", f"{found['items_without_row']:,}")
        table.add_row(escape(one_line(f"rows of other items in that file{first}")), f"{found['unknown_ids']:,}")
    for metric, value in info.get("oracle", {}).get("test", {}).items():
        table.add_row(f"{metric.upper()} of an oracle that knows the process", f"{value:.4f}")
    Console().print(table)
