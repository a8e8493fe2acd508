"""How accurate is Fuxi-MME compared with its baselines and without either of its two parts, over several seeds?

    python -m benchmarks.accuracy --data quickstart
    python -m benchmarks.accuracy --data ml-latest-small --input ratings.csv --seed 42 --seed 43 --seed 44
    python -m benchmarks.accuracy --data quickstart --model fuxi-alpha --model fuxi-mme --tables 4 --work runs/tables-4
    python -m benchmarks.accuracy --data amazon-beauty --input amazon_beauty_5core.parquet --trials 16 --jobs 2

Every model is trained by `mme train` in a separate process, one after another, on the same split and for the same number of
epochs. Item tables have the same number of parameters in all models (`--tables 4`: twice as many). Each model is tested at the
checkpoint that the validation split selects (leave_two_out). A finished run is not trained again; a stopped one resumes from its
checkpoint. With `--trials`, each model is first tuned by `mme tune` (`benchmarks.tuning`), and the settings of its best trial are
trained with every seed; tables then differ in size.

The significance test pairs users: it compares the NDCG@10 of each user, averaged over the seeds, with that of FuXi-α. The
two-sided p comes from random signs of the differences, and Holm's method corrects it for the number of models.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from scipy.stats import permutation_test
from torch import Tensor

from benchmarks.json_file import write_json
from benchmarks.tuning import tune
from benchmarks.user_ranks import RANKS_JSON
from mme.config import CONFIG_FILE, Config, load_config
from mme.errors import UserError
from mme.evaluation.record import METRICS
from mme.report.compare import holm
from mme.run.metrics_file import METRICS_FILE, read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
SINGLE_TABLE_HEAD = 64  # width of a head in models with one table
DENSE = ["model.moe.num_experts=0"]
EXPERTS = [
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.router=all_views",
    "model.moe.load_balance_coef=0.001",
]
MODELS: dict[str, tuple[bool, list[str]]] = {  # whether it has several tables, and its other overrides
    "sasrec": (False, [*DENSE, "model.block=sasrec"]),
    "esasrec": (False, [*DENSE, "model.block=ligr"]),
    "hstu": (False, [*DENSE, "model.block=hstu"]),
    "fuxi-alpha": (False, DENSE),
    "multi-embedding": (True, DENSE),
    "moe": (False, EXPERTS),
    "fuxi-mme": (True, EXPERTS),
}
PUBLIC = ("amazon-beauty", "amazon-sports", "amazon-movies", "ml-1m")  # need --input
BATCH_SIZE = {"quickstart": 64, "ml-latest-small": 64} | dict.fromkeys(
    PUBLIC, 128
)  # sequences of all processes together
VIEW_DIM = {"quickstart": 64, "ml-latest-small": 32} | dict.fromkeys(PUBLIC, 64)
# Overrides of the data's configuration for models with one table (False) and with several: what the validation split preferred for
# FuXi-α and for Fuxi-MME (docs/reproducing.md); the other models share them. The hidden layer of an FFN or expert is 64 wide in
# every view, or as wide as the table if there is only one.
SETTINGS: dict[str, dict[bool, list[str]]] = {
    "quickstart": {
        False: ["loss.views=together", "model.score_norm=concat", "model.dropout=0.6", "train.lr_schedule=cosine"],
        True: [],
    },
    "ml-latest-small": {
        False: ["model.ffn_multiplier=1", "train.lr=0.004", "model.dropout=0.3"],
        True: [
            "model.num_heads=2",
            "model.dqk=32",
            "model.dv=32",
            "model.ffn_multiplier=2",
            "train.lr=0.004",
            "model.dropout=0.4",
        ],
    },
} | {
    data: {
        False: ["loss.views=together", "model.score_norm=concat"],
        True: ["loss.views=each", "model.score_norm=per_view"],
    }
    for data in PUBLIC
}
COMPARED_WITH = "fuxi-alpha"
NUM_FLIPS = 10_000


def main(
    data: Annotated[
        str, typer.Option(help=f"One of {', '.join(SETTINGS)}; all but quickstart need --input.")
    ] = "quickstart",
    input_file: Annotated[Optional[Path], typer.Option("--input", help="The file of the data set's events.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"One of {', '.join(MODELS)}; can be repeated. Default: all."),
    ] = None,
    seed: Annotated[Optional[list[int]], typer.Option(help="Seed; can be repeated. Default: 42, 43, 44.")] = None,  # noqa: UP045
    tables: Annotated[
        int, typer.Option(min=2, help="Tables of models with several; a single table is as wide as these together.")
    ] = 2,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs per run; the best one on the validation split counts.")
    ] = 60,
    setting: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="[MODEL:]key.path=value, for all models or one."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes per run.")] = 1,
    trials: Annotated[
        int, typer.Option(min=0, help="Trials of a search for each model before its runs; 0: no search.")
    ] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once.")] = 1,
    work: Annotated[Path, typer.Option(help="Folder of data sets and runs.")] = Path("runs/accuracy"),
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Path of the .json and .md without suffix. Default: in --work."),
    ] = None,
) -> None:
    """Trains the missing runs, prints the table and writes it as JSON and Markdown."""
    models, seeds = model or list(MODELS), seed or [42, 43, 44]
    try:
        for name in models:
            if name not in MODELS:
                raise UserError(f"--model {name}: expected one of {', '.join(MODELS)}")
        dataset = prepare(data, input_file, work)
        batch_size = BATCH_SIZE[data]
        if processes < 1 or batch_size % processes:
            raise UserError(f"--processes {processes}: expected a divisor of {batch_size}, the sequences of a batch")
        runs, searches = {}, {}
        for name in models:
            own = [
                f"data.path={dataset}",
                "data.protocol=leave_two_out",
                f"data.batch_size={batch_size // processes}",
                *overrides_of(name, data, tables),
                f"train.epochs={epochs}",
                *set_for(name, setting or []),
            ]
            if trials:
                searches[name] = tune(name, _configuration(data), own, work / "tune" / data / name, trials, jobs)
                own += searches[name].overrides
            runs[name] = [train(name, one, data, own, work, processes) for one in seeds]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    rows = summarise(runs)
    for name, search in searches.items():
        rows[name] |= {"tuned": search.overrides, "trials": search.trials}
    stem = output or work / data
    about = {
        "data": data,
        "seeds": seeds,
        "tables": tables,
        "epochs": epochs,
        "settings": setting or [],
        "processes": processes,
        "trials": trials,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "compared_with": COMPARED_WITH if COMPARED_WITH in runs else None,
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), about | {"models": rows})
    page = markdown(about, rows)
    stem.with_suffix(".md").write_text(page)
    print(page)


def prepare(data: str, input_file: Path | None, work: Path) -> Path:
    """The folder of the prepared data set, which is prepared if it does not exist."""
    folder = work / "data" / data
    if data not in SETTINGS:
        raise UserError(f"--data {data}: expected one of {', '.join(SETTINGS)}")
    if (folder / "dataset.json").exists():
        return folder
    if data == "quickstart":
        source = ["--synthetic", "quickstart"]
    elif input_file is None:
        raise UserError(f"--data {data}: expected the file of its events as --input")
    else:
        source = ["--input", str(input_file), "--format", "auto"]
    _run([sys.executable, "-m", "mme", "prepare", *source, "--output", str(folder)])
    return folder


def overrides_of(name: str, data: str, tables: int) -> list[str]:
    """The overrides that turn the data's configuration into a model. Its tables together are as wide as ``tables`` views."""
    several, others = MODELS[name]
    width = tables * VIEW_DIM[data]
    heads = [] if several else [f"model.num_heads={width // SINGLE_TABLE_HEAD}"]
    shape = [f"model.num_tables={tables if several else 1}", f"model.embedding_dim={width}", *heads]
    return [*shape, *others, *SETTINGS[data][several]]


def set_for(name: str, settings: list[str]) -> list[str]:
    """The ``settings`` for this model: ``key.path=value`` and ``name:key.path=value``."""
    own = []
    for setting in settings:
        model, colon, override = setting.partition(":")
        if not colon or "=" in model:  # the colon is in the value
            own.append(setting)
        elif model not in MODELS:
            raise UserError(f"--set {setting}: unknown model {model}: expected one of {', '.join(MODELS)}")
        elif model == name:
            own.append(override)
    return own


def train(name: str, seed: int, data: str, own: list[str], work: Path, processes: int) -> dict[str, Any]:
    """The test records and ranks of one run, which is trained unless it is finished already."""
    folder = work / "runs" / data / name / f"seed-{seed}"
    path = _configuration(data)
    overrides = [*own, f"train.seed={seed}", f"output_dir={folder}"]
    config = load_config(path, overrides)
    if (folder / CONFIG_FILE).exists() and load_config(folder / CONFIG_FILE) != config:
        raise UserError(f"{folder}: has a run with another configuration: choose another --work")
    if not (folder / RANKS_JSON).exists():
        started = time.perf_counter()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), "-m", "mme", "train", "--config", str(path)]
        _run([*command, *overrides])
        _run([sys.executable, "-m", "benchmarks.user_ranks", str(folder)])
        print(f"{data} {name} seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return read_run(folder, config)


def read_run(folder: Path, config: Config) -> dict[str, Any]:
    """The last test records of the model and of popularity, the parameters, the time of a step, and the users' ranks."""
    records = read_metrics(folder / METRICS_FILE)
    tests = {record["model"]: record for record in records if record.get("split") == "test"}
    ranks = json.loads((folder / RANKS_JSON).read_text())
    (name,) = set(ranks) - {"popularity"}
    steps = [record for record in records if record["kind"] == "train"]
    return {
        "seed": config.train.seed,
        "model": tests[name],
        "popularity": tests["popularity"],
        "parameters": next(record["parameters"] for record in records if record["kind"] == "run"),
        "step_ms": statistics.median(record["step_ms"] for record in steps),
        "ranks": torch.tensor(ranks[name]),
        "popularity_ranks": torch.tensor(ranks["popularity"]),
    }


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Model → mean and standard deviation of each metric over the seeds, and lift and p over FuXi-α; popularity comes first.

    Raises:
        UserError: two runs were not tested on the same targets.
    """
    targets = {run[kind]["targets_sha256"] for of_model in runs.values() for run in of_model for kind in ("model",)}
    if len(targets) != 1:
        raise UserError(f"the runs were tested on {len(targets)} different lists of targets")
    first = next(iter(runs.values()))[0]
    gains = {"popularity": ndcg_at_10(first["popularity_ranks"])}
    rows: dict[str, dict[str, Any]] = {
        "popularity": {metric: {"mean": first["popularity"][metric], "std": None} for metric in METRICS}
    }
    for name, of_model in runs.items():
        gains[name] = torch.stack([ndcg_at_10(run["ranks"]) for run in of_model]).mean(0)
        rows[name] = {metric: _mean_and_std([run["model"][metric] for run in of_model]) for metric in METRICS} | {
            "parameters": of_model[0]["parameters"],
            "seeds": {str(run["seed"]): {"step": run["model"]["step"]} | _metrics(run["model"]) for run in of_model},
            "step_ms": statistics.median(run["step_ms"] for run in of_model),
        }
    if COMPARED_WITH in runs:
        others = [name for name in gains if name != COMPARED_WITH]
        baseline = gains[COMPARED_WITH].mean().item()
        ps = [paired_p(gains[name] - gains[COMPARED_WITH]) for name in others]
        for name, p, p_holm in zip(others, ps, holm(ps), strict=True):
            lift = gains[name].mean().item() / baseline - 1 if baseline else None
            rows[name] |= {"lift": lift, "p": p, "p_holm": p_holm}
    return rows


def ndcg_at_10(ranks: Tensor) -> Tensor:
    """(users,) int64 ranks, which start at 1 → (users,) float64 NDCG@10."""
    return torch.where(ranks <= 10, 1 / torch.log2(ranks.double() + 1), 0.0)


def paired_p(differences: Tensor, num_flips: int = NUM_FLIPS) -> float:
    """Two-sided p for the mean of paired ``differences`` (users,) being 0, by a permutation test over their signs.

    The signs are flipped at random ``num_flips`` times, so p is at least 1 / (num_flips + 1). If there are no more combinations of
    signs than that, all of them are counted.
    """
    nonzero = differences[differences != 0].double().numpy()
    if nonzero.size < 2:
        return 1.0  # the p of one difference is 1, and a test of none is undefined
    result = permutation_test(
        (nonzero,),
        lambda sample, axis: abs(sample.sum(axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=num_flips,
        batch=1000,
        rng=0,
    )
    return float(result.pvalue)


def markdown(about: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown."""
    seeds = ", ".join(map(str, about["seeds"]))
    lines = [
        f"{about['data']}, leave_two_out, seeds {seeds}, mean ± standard deviation over the seeds; lift and p are those of "
        f"NDCG@10 over {COMPARED_WITH}, p over users, corrected by Holm's method.",
        "",
        f"| model | {' | '.join(metric.upper() for metric in METRICS)} | lift | p |",
        "|---|" + "---|" * (len(METRICS) + 2),
    ]
    for name, row in rows.items():
        cells = [_cell(row[metric]) for metric in METRICS]
        lift, p = row.get("lift"), row.get("p_holm")
        cells += ["" if lift is None else f"{lift:+.1%}", "" if p is None else f"{p:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _configuration(data: str) -> Path:
    return REPOSITORY / "configs" / f"{data}.yaml"


def _cell(value: dict[str, Any]) -> str:
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")


def _mean_and_std(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _metrics(record: dict[str, Any]) -> dict[str, float]:
    return {metric: record[metric] for metric in METRICS}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    typer.run(main)
