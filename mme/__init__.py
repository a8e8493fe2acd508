"""Fuxi-MME: a sequential recommender with many item-embedding tables and a shared mixture-of-experts decoder.

    model = mme.load("runs/quickstart")
    model.recommend([{"item_ids": [3, 17, 4], "timestamps": [1700000000, 1700000600, 1700086400]}], k=10)

Importing this package loads nothing heavy; torch and pyarrow come with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mme.inference.model import TrainedModel

__version__ = "0.1.0"


def load(path: str | Path, device: str | torch.device | None = None, checkpoint: int | None = None) -> TrainedModel:
    """A trained model, to recommend, score and embed with; no process group is needed.

    Args:
        path: a run's folder (its best checkpoint is read), or a file of `mme export --what weights`.
        device: default: CUDA where there is one, otherwise the CPU.
        checkpoint: of a run, the step; default: the best on the validation split.

    Raises:
        mme.errors.UserError: nothing is there, it is damaged, or it does not belong to its data set.
    """
    from pathlib import Path

    from mme.errors import UserError
    from mme.inference.exported import read_export
    from mme.inference.run import load_run

    found = Path(path)
    if found.is_dir():
        return load_run(found, checkpoint, device)
    if checkpoint is not None:
        raise UserError(f"{found}: no run's folder, so it has no checkpoint {checkpoint}")
    if found.exists():
        return read_export(found, device)
    raise UserError(f"{found}: no such run or export")
