"""The range of times that a training set covers, read from the statistics of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from mme.data.parquet import open_parquet
from mme.data.parts import TIMES


def time_range(folder: Path, info: dict[str, Any]) -> tuple[int, int]:
    """The first and the last time of all events, in seconds.

    Args:
        info: the content of dataset.json of the set in ``folder``.

    Raises:
        UserError: a part is missing or damaged.
    """
    lowest, highest = [], []
    for part in info["parts"]:
        with open_parquet(folder, part["file"]) as file:
            for number in range(file.metadata.num_row_groups):
                low, high = _range_of(file, number)
                if low is not None and high is not None:
                    lowest.append(low)
                    highest.append(high)
    return min(lowest, default=0), max(highest, default=0)


def _range_of(file: pq.ParquetFile, row_group: int) -> tuple[int | None, int | None]:
    group = file.metadata.row_group(row_group)
    for column in range(group.num_columns):
        chunk = group.column(column)
        if chunk.path_in_schema.split(".")[0] == TIMES and chunk.statistics and chunk.statistics.has_min_max:
            return chunk.statistics.min, chunk.statistics.max
    times = file.read_row_group(row_group, columns=[TIMES])[TIMES]
    found = pc.min_max(pc.list_flatten(times)).as_py()
    return found["min"], found["max"]
