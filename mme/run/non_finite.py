"""Finds a loss or gradient that is not finite before any weight changes, and keeps its batch for inspection.

A single NaN would spread to every weight within a step. The check is part of a sum over the ranks that each step has anyway,
so all ranks decide the same way. It comes before the decoder's optimizer and before the tables' backward pass, which FBGEMM
fuses with their update.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mme.data.batch import SequenceBatch
from mme.files import make_folder, replacing

NON_FINITE_FOLDER = "non_finite"  # in the run's folder
MOST_KEPT = 100  # batches of skipped steps
MOST_IN_A_ROW = 100  # skipped steps after which the job stops, because the batch is not the cause


def is_spoiled(gradients: Iterable[Tensor], world_size: int) -> Tensor:
    """() bool: whether a gradient is not finite, or so large that its sum over the ranks or its square overflows.

    Adam keeps squares, and one that overflows would freeze its weight for the rest of the run.
    """
    present = [gradient for gradient in gradients if gradient.numel()]  # a rank without sequences looks up no row
    norm = torch.nn.utils.get_total_norm(present, norm_type=torch.inf)
    return ~torch.isfinite((norm * world_size).square())


def save_batch(run: Path, step: int, rank: int, batch: SequenceBatch) -> Path:
    """Writes this rank's part of the batch as Parquet, one row per sequence, and returns the path.

    Columns: ``user_row`` (its row in the prepared data set), ``seq_offset`` (its first token in the batch), ``item_ids``,
    ``target_ids`` and ``timestamps``, which has one entry more, as in `SequenceBatch`.
    """
    offsets = batch.seq_offsets.cpu()
    time_offsets = offsets + torch.arange(offsets.numel())

    def lists(values: Tensor, starts: Tensor) -> pa.Array:
        return pa.LargeListArray.from_arrays(starts.numpy(), values.cpu().numpy())

    table = pa.table(
        {
            "user_row": batch.user_rows.cpu().numpy(),
            "seq_offset": offsets[:-1].numpy(),
            "item_ids": lists(batch.item_ids, offsets),
            "target_ids": lists(batch.target_ids, offsets),
            "timestamps": lists(batch.timestamps, time_offsets),
        }
    )
    path = run / NON_FINITE_FOLDER / f"step_{step}_rank_{rank}.parquet"
    make_folder(path.parent, run)
    with replacing(path, run) as partial:
        pq.write_table(table, partial)
    return path
