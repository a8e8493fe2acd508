"""The search of hyper-parameters for each model of `benchmarks.accuracy`, by `mme tune`.

Every model gets the same number of trials and the same space of what all models have. A model also searches what only it has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Space = dict[str, Any]

SHARED: Space = {
    "model.embedding_dim": [64, 128, 256],
    "model.num_blocks": {"low": 1, "high": 4},
    "model.num_heads": [1, 2, 4],
    "model.dropout": {"low": 0.1, "high": 0.7, "step": 0.1},
    "train.lr": {"low": 3.0e-4, "high": 3.0e-3, "log": True},
    "train.weight_decay": [0.0, 0.001, 0.01, 0.1],
    "train.weight_decay_on": ["all", "matrices"],
    "loss.num_negatives": [128, 256, 512],
    "loss.temperature": {"low": 0.03, "high": 0.1, "log": True},
}
FFN: Space = {"model.ffn_multiplier": [1, 2, 4]}
NORMS: Space = {"model.final_norm": [False, True], "model.positions_from": ["oldest", "newest"]}
TABLES: Space = {"model.num_tables": [2, 4], "loss.views": ["together", "each", "both"]}
EXPERTS: Space = {
    "model.moe.num_experts": [4, 8],
    "model.moe.top_k": [1, 2],
    "model.moe.router": ["view", "all_views"],
    "model.moe.load_balance_coef": {"low": 1.0e-4, "high": 1.0e-2, "log": True},
}
OWN: dict[str, Space] = {
    "sasrec": {
        **FFN,
        **NORMS,
        "model.sasrec.norm_first": [True, False],
        "model.sasrec.attention_output_dropout": [True, False],
    },
    "esasrec": {**FFN, **NORMS},
    "hstu": {},
    "fuxi-alpha": FFN,
    "multi-embedding": {**FFN, **TABLES},
    "moe": {**FFN, **EXPERTS},
    "fuxi-mme": {**FFN, **TABLES, **EXPERTS},
}


@dataclass(frozen=True)
class Tuned:
    """The result of a model's search.

    Attributes:
        overrides: ``key=value`` of the trial with the highest validation NDCG@10.
        trials: all trials, best and worst, as in `mme tune`'s trials.json.
    """

    overrides: list[str]
    trials: list[dict[str, Any]]


def space_of(name: str) -> str:
    """The search space of a model as YAML, for `mme tune --space`."""
    return yaml.safe_dump({**SHARED, **OWN[name]}, sort_keys=False)


def tune(name: str, config: Path, overrides: list[str], folder: Path, trials: int, jobs: int) -> Tuned:
    """Runs the trials that are missing in ``folder``, ``jobs`` at once.

    Raises:
        SystemExit: `mme tune` failed; it has printed the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    space = folder / "space.yaml"
    space.write_text(space_of(name))
    options = ["--config", config, "--space", space, "--output", folder / "search", "--trials", trials, "--jobs", jobs]
    command = [sys.executable, "-m", "mme", "tune", *map(str, options), *overrides]
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    rows = json.loads((folder / "search" / "trials.json").read_text())
    best = max((row for row in rows if row["state"] == "complete"), key=lambda row: row["ndcg@10"])
    return Tuned([f"{key}={json.dumps(value)}" for key, value in best["values"].items()], rows)
