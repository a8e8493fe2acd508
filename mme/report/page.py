"""report.html of one or several runs: a single file that works offline.

All content comes from the runs' folders and, if it still exists, the data set's dataset.json. Figures that a run has not
recorded are left out. The templates escape all text, and the page's content security policy admits only its own scripts and
style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mme.config import CONFIG_FILE, flat
from mme.errors import UserError
from mme.files import write_text
from mme.report.experts import expert_warnings, experts_section
from mme.report.insight import insight_section
from mme.report.results import (
    METRICS,
    SELECTED_BY,
    RunFiles,
    below_popularity,
    figure,
    ratio,
    read_run,
    repeats,
    result_rows,
)
from mme.report.sections import Rows, Section, points
from mme.report.text import printable_lines, shell_command
from mme.report.training import compared_training_section, training_section
from mme.report.users import compared_users_section, users_section
from mme.run.monitor import duration
from mme.table_placement import TablePlacement, in_lines

REPORT_FILE = "report.html"
ASSETS = Path(__file__).parent / "assets"
INTERVAL_NOTE = "± is half a 95% confidence interval over users."
SCRIPTS = ("vega.min.js", "charts.js")  # Vega with Vega-Lite and Vega-Embed; the code that embeds the page's charts


def write_report(run: Path, output: Path | None = None) -> Path:
    """Writes the report of a run, by default as ``report.html`` in its folder, and returns its path.

    Raises:
        UserError: see `mme.report.results.read_run`; or the folder of ``output`` does not exist, or the file cannot be written.
    """
    page = _run_page(read_run(run))
    if output is None:
        return _write(run / REPORT_FILE, page, run)
    return _write(_checked(output), page)


def write_compared_report(folders: Sequence[Path], output: Path) -> Path:
    """Writes one page with several runs side by side and returns its path.

    Raises:
        UserError: see `mme.report.results.read_run`; or the folder of ``output`` does not exist, or the file cannot be written.
    """
    page = _compared_page([read_run(folder) for folder in folders])
    return _write(_checked(output), page)


def _write(path: Path, page: str, root: Path | None = None) -> Path:
    try:
        write_text(path, page, root)
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _checked(output: Path) -> Path:
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output {output}: expected a file in an existing folder")
    return output


def _run_page(run: RunFiles) -> str:
    sections = [
        users_section(run),
        training_section(run),
        experts_section(run.of_kind("experts")),
        insight_section(run.result.get("insight") or {}),
        _parameters(run),
    ]
    return _rendered(
        "run.html",
        title=run.name,
        subtitle=[_shape(run), _place(run)],
        tiles=_tiles(run),
        warnings=_warnings(run),
        results=_results(run),
        sections=[part for part in sections if part],
        setup=_setup(run),
        restarts=len(run.of_kind("run")) - 1,
        command=_command(run),
        configuration=run.config_text,
    )


def _compared_page(runs: Sequence[RunFiles]) -> str:
    names = _distinct_names(runs)
    warnings = [
        f"{name}: {text}"
        for run, name in zip(runs, names, strict=True)
        for text in (below_popularity(run), repeats(run))
        if text
    ]
    if len({run.result.get("targets_sha256") for run in runs if run.result}) > 1:
        warnings.insert(0, "The runs were evaluated on different targets: their metrics cannot be compared.")
    rows = [
        (name, [figure(run.result, metric) for metric in METRICS] + [ratio(run.result.get(SELECTED_BY), run.baseline.get(SELECTED_BY))])
        for run, name in zip(runs, names, strict=True)
    ]  # fmt: skip
    head = [*(metric.upper() for metric in METRICS), "NDCG@10 ÷ popularity"]
    settings = [{key: str(value) for key, value in flat(run.config).items()} for run in runs]
    differing = [
        key for key in settings[0] if key != "output_dir" and len({of_run.get(key) for of_run in settings}) > 1
    ]
    table = Rows([(key, [of_run.get(key, "–") for of_run in settings]) for key in differing], head=names)
    sections = [
        compared_users_section(runs, names),
        compared_training_section(runs, names),
        Section("Configuration differences", tables=[table]),
    ]
    return _rendered(
        "runs.html",
        title=f"{len(runs)} runs",
        subtitle=[", ".join(names)],
        warnings=warnings,
        results=Section("Results", notes=_compared_notes(runs), tables=[Rows(rows, head=head)]),
        sections=[part for part in sections if part],
    )


def _distinct_names(runs: Sequence[RunFiles]) -> list[str]:
    """The folders' names, or their paths if two have the same name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _rendered(template: str, **context: Any) -> str:
    scripts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_source_hash, scripts))}",
            f"style-src {_source_hash(style)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return _environment().get_template(template).render(
        context, scripts=[Markup(script) for script in scripts], style=Markup(style), policy=policy
    )  # fmt: skip


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mme.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters["count"] = _count
    return environment


def _printable(value: Any) -> Any:
    """Filters every expression of the templates before it is escaped."""
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shape(run: RunFiles) -> str:
    model = run.config.model
    experts = f"{model.moe.num_experts} experts (top {model.moe.top_k})" if model.moe.num_experts else "dense FFN"
    names = {"hstu": "HSTU", "sasrec": "SASRec", "ligr": "eSASRec"}
    kind = f"blocks, {experts}" if model.block == "fuxi" else f"{names.get(model.block, model.block)} blocks"
    return f"M = {model.num_tables} tables, D = {model.embedding_dim}, {model.num_blocks} {kind}"


def _place(run: RunFiles) -> str:
    info = _run_info(run)
    processes = info.get("world_size", 1)
    facts = [
        (info.get("time") or "")[:16].replace("T", " "),
        info.get("device") or "",
        f"{processes} process{'es' if processes != 1 else ''}" if info else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _run_info(run: RunFiles) -> dict[str, Any]:
    """The newest record of the kind "run", of which a resumed run has several."""
    return next(iter(reversed(run.of_kind("run"))), {})


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    tiles = [
        (f"{run.split} {metric.upper()}", f"{run.result[metric]:.4f}")
        for metric in ("ndcg@10", "hr@10")
        if run.result.get(metric) is not None
    ]
    if run.result.get(SELECTED_BY) is not None and run.baseline.get(SELECTED_BY):
        tiles.append(("NDCG@10 ÷ popularity", ratio(run.result[SELECTED_BY], run.baseline[SELECTED_BY])))
    train = run.of_kind("train")
    rates = sorted(rate for _, rate in points(train, "tokens_per_s"))
    if rates:
        tiles.append(("tokens/s, median", _count(rates[len(rates) // 2])))
    if used := sorted(share for _, share in points(train, "mfu")):
        tiles.append(("MFU, median", f"{used[len(used) // 2]:.1%}"))
    if memory := [gib for _, gib in points(train, "peak_mem_gib")]:
        tiles.append(("peak memory", f"{max(memory):.3g} GiB"))
    if train:
        tiles.append(("steps", f"{train[-1]['step']:,}"))
        tiles.append(("time in steps", duration(_training_s(train))))
    if parameters := _run_info(run).get("parameters"):
        tiles.append(("parameters", _count(sum(parameters.values()))))
    return tiles


def _training_s(train: Sequence[dict[str, Any]]) -> float:
    before = [0, *(record["step"] for record in train)]
    return sum((r["step"] - b) * (r.get("step_ms") or 0.0) for r, b in zip(train, before, strict=False)) / 1000


def _warnings(run: RunFiles) -> list[str]:
    experts: dict[str, Any] = next(iter(reversed(run.of_kind("experts"))), {})
    found = [below_popularity(run), repeats(run), *expert_warnings(experts, run.config.model.moe.top_k)]
    lost = [record["step"] for record in run.of_kind("train") if "loss" in record and record["loss"] is None]
    if lost:
        found.append(f"The loss was not finite at step {lost[0]:,}.")
    if not run.results:
        found.append("The run has no evaluation: it ended before its first one.")
    return [text for text in found if text]


def _results(run: RunFiles) -> Section | None:
    if not run.results:
        return None
    rows = result_rows(run)
    strong = next((place for place, (name, _) in enumerate(rows) if name == run.model), None)
    table = Rows(rows, head=[metric.upper() for metric in METRICS], strong=strong)
    return Section("Results", notes=_result_notes(run), tables=[table])


def _result_notes(run: RunFiles) -> list[str]:
    record = next(iter(run.results.values()))
    facts = [f"Metrics of the checkpoint of step {run.step:,} on the {run.split} split"]
    if record.get("users") is not None:
        facts.append(f"{record['users']:,} users")
    names = {"protocol": "protocol", "sort_rule": "order of events", "targets_sha256": "SHA-256 of the targets"}
    facts += [f"{name}: {record[key]}" for key, name in names.items() if record.get(key)]
    notes = ["; ".join(facts) + ".", _seen_rule(record)]
    if record.get("repeated_targets") is not None:
        notes.append(f"{record['repeated_targets']:.2%} of the targets are items of the user's history.")
    if record.get("standard_errors"):
        notes.append(INTERVAL_NOTE)
    if run.oracle:
        notes.append("The oracle knows the process that generated the data, so no model can be better on average.")
    return [" ".join(notes)]


def _compared_notes(runs: Sequence[RunFiles]) -> list[str]:
    has_errors = any(run.result.get("standard_errors") for run in runs)
    test = "`mme compare` tests the differences user by user."
    return [f"{INTERVAL_NOTE} {test}" if has_errors else test]


def _seen_rule(record: dict[str, Any]) -> str:
    return {
        "exclude": "Items of the user's history are not ranked, so a target among them is a miss.",
        "include": "All items of the catalogue are ranked.",
    }.get(
        record.get("seen") or "",
        "Items of the user's history are not ranked, except for the target.",  # runs that do not record `seen`
    )


def _parameters(run: RunFiles) -> Section | None:
    parameters = _run_info(run).get("parameters")
    if not parameters:
        return None
    total = sum(parameters.values())
    rows = [(part, [f"{count:,}", f"{count / (total or 1):.1%}"]) for part, count in parameters.items()]
    where = in_lines(TablePlacement.from_record(table) for table in _run_info(run).get("tables", []))
    notes = [f"{'; '.join(where)}."] if where else []
    return Section("Parameters", notes=notes, tables=[Rows([*rows, ("total", [f"{total:,}", ""])])])


def _setup(run: RunFiles) -> list[Rows]:
    data = {key: value for key, value in run.dataset.items() if isinstance(value, (str, int)) and key != "format"}
    data_rows = [("path", [run.config.data.path])]
    data_rows += [(key, [f"{value:,}" if isinstance(value, int) else value]) for key, value in data.items()]
    versions = [(package, [version]) for package, version in _run_info(run).get("versions", {}).items()]
    return [Rows(rows, title=title) for title, rows in (("Data set", data_rows), ("Versions", versions)) if rows]


def _command(run: RunFiles) -> str:
    """The command that trains the same model again in another folder."""
    words = ["mme", "train", "--config", str(run.folder / CONFIG_FILE), f"output_dir={run.folder}-again"]
    processes = _run_info(run).get("world_size", 1)
    if processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", *words]
    return shell_command(words)


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}"
