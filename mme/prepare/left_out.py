"""Keeps the events that the count filters left out, because later additions may let their users and items pass.

left_out.parquet has one row per event: user_id, item_id (raw), timestamp, place (how many kept events of its user come before it),
and its `Histories.columns`. The events of a user are consecutive and in order.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mme.data.layout import LEFT_OUT_FILE
from mme.prepare.histories import BoolArray, Histories, places_among


class LeftOutWriter:
    """Writes the file if there is any such event.

    Attributes:
        users: number of users without a kept event.
        events: number of events in the file.
    """

    def __init__(self, folder: Path, raw_items: pa.Array) -> None:
        self._path = folder / LEFT_OUT_FILE
        self._raw_items = raw_items
        self._file: pq.ParquetWriter | None = None
        self.users = self.events = 0

    def __enter__(self) -> LeftOutWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, histories: Histories, kept: BoolArray) -> None:
        """Adds the events of whole histories that are not ``kept`` (E,)."""
        if kept.all():
            return
        out = ~kept
        user = histories.user_of_event()
        self.users += histories.rows.size - np.unique(user[kept]).size
        self.write(histories, out, places_among(kept, histories)[out])

    def write(self, histories: Histories, out: BoolArray, places: np.ndarray) -> None:
        """Adds the events for which ``out`` (E,) is true, with their ``places``."""
        table = pa.table(
            {
                "user_id": histories.user_ids.take(pa.array(histories.user_of_event()[out])),
                "item_id": self._raw_items.take(pa.array(histories.codes[out])),
                "timestamp": histories.times[out],
                "place": pa.array(places, pa.int32()),
                **{name: values[out] for name, values in histories.columns.items()},
            }
        )
        self._file = self._file or pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._file.write_table(table)
        self.events += table.num_rows
