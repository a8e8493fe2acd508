"""Fuxi-MME: a sequential recommender with many item-embedding tables and a shared mixture-of-experts decoder.

    run = mme.train("configs/quickstart.yaml", ["train.epochs=20"])
    model = mme.load("runs/quickstart")  # or run.load()
    model.recommend([{"item_ids": [3, 17, 4], "timestamps": [1700000000, 1700000600, 1700086400]}], k=10)

Importing this package loads nothing heavy; the first call of `load` imports torch and pyarrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    import torch

    from mme.config import Config
    from mme.inference.model import TrainedModel
    from mme.inference.run import Run

__version__ = "0.1.0"


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    checkpoint: int | None = None,
    index: str | Path | None = None,
) -> TrainedModel:
    """Loads a trained model that recommends, scores and embeds. It needs no process group.

    Args:
        path: a run's folder, or a file written by `mme export --what weights`.
        device: where to compute; None selects CUDA if available, otherwise the CPU.
        checkpoint: the step of a run's checkpoint; None selects the best one on the validation split.
        index: a file written by `mme export --what index` from this model, which `recommend` searches; None: exact search.

    Raises:
        mme.errors.UserError: a path does not exist or is damaged, or a run does not match its data set or its index.
    """
    from pathlib import Path

    from mme.errors import UserError
    from mme.inference.exported import read_export
    from mme.inference.run import load_run

    found = Path(path)
    if found.is_dir():
        model = load_run(found, checkpoint, device)
    elif checkpoint is not None:
        raise UserError(f"{found}: is not a run's folder, so it has no checkpoint {checkpoint}")
    elif found.exists():
        model = read_export(found, device)
    else:
        raise UserError(f"{found}: no such run or export")
    if index is not None:
        model.use_index(Path(index))
    return model


def train(config: Config | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Run:
    """Trains a model in this process, as `mme train` does, and returns its run.

    The run's folder, ``output_dir``, gets what `mme train` writes there, report.html included. A run that is there already
    resumes from its newest complete checkpoint.

    Args:
        config: a YAML file, the same as nested mappings, or a `mme.config.Config`.
        overrides: values that replace those of ``config``, such as ``"train.lr=0.002"``.

    Raises:
        mme.errors.UserError: the configuration or the data are wrong, or a package is missing.
        mme.errors.JobError: the job failed, for example because the loss is not finite.
        mme.errors.Preempted: SIGTERM stopped the job; everything is saved.
    """
    from mme.inference.run import train_run

    return train_run(config, overrides)
