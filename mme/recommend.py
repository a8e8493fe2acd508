"""Top-K items for histories in Parquet, in the item ids of the raw data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mme.config import load_config
from mme.data.batch import SequenceBatch
from mme.data.parts import read_info
from mme.distributed.checkpoint import load_weights
from mme.distributed.groups import World, process_group
from mme.distributed.recommender import Recommender
from mme.errors import UserError
from mme.ranking import Ranker

REQUEST_TIME = "request_timestamp"


def recommend(run: Path, users: Path, top_k: int, output: Path) -> int:
    """Writes the ``top_k`` best unseen items of each history; returns the number of histories.

    Args:
        run: a run's folder; its best checkpoint is used.
        users: Parquet with `user_id`, `item_ids` (list of raw item ids, oldest first), `timestamps` (list of integer
            seconds) and, if wanted, `request_timestamp` (integer seconds: when the recommendation is asked for;
            default: the time of the last event).
        output: Parquet with `user_id`, `item_ids` (list of raw item ids, best first) and `scores` (list of float),
            written whole or not at all.

    Raises:
        UserError: a file, column, row or item is missing, unknown or of the wrong type, or a history is empty.
    """
    config = load_config(run / "config.yaml")
    with process_group() as world:
        num_items = read_info(Path(config.data.path))["num_items"]
        catalogue = _raw_item_ids(Path(config.data.path))
        histories = _read_histories(users, catalogue)
        recommender = Recommender(config, num_items, world)
        load_weights(run, None, recommender)
        ranker = Ranker(recommender)
        results = []
        for start in range(0, histories.num_rows, config.data.eval_batch_size * world.size):
            table = histories.slice(start, config.data.eval_batch_size * world.size)
            batch, seen = _batch(table, config.data.max_seq_len, world)
            items, scores = ranker.top_k(batch, seen[0], seen[1], top_k)
            results.append(_result(table, items, scores, catalogue))
        if world.rank == 0:
            _write_whole(pa.concat_tables(results), output)
    return histories.num_rows


def _raw_item_ids(dataset: Path) -> pa.Array:
    """Raw item ids by item index."""
    table = pq.read_table(dataset / "items.parquet").sort_by("item_index")
    return table["item_id"].combine_chunks()


def _read_histories(users: Path, catalogue: pa.Array) -> pa.Table:
    """The histories with item indices in place of raw ids, checked row by row."""
    try:
        table = pq.read_table(users)
    except FileNotFoundError as error:
        raise UserError(f"{users}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{users}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    for column in ("user_id", "item_ids", "timestamps"):
        if column not in table.column_names:
            raise UserError(f"{users}: no column {column!r} (found: {', '.join(table.column_names)})")
    if table.num_rows == 0:
        raise UserError(f"{users}: no rows: expected one history a row")
    raw = _list_column(table, users, "item_ids")
    times = _list_column(table, users, "timestamps")
    if not pa.types.is_integer(times.type.value_type):
        raise UserError(f"{users}: column 'timestamps' holds {times.type.value_type}, expected integer seconds")
    lengths = pc.list_value_length(raw)
    for row, (events, stamps) in enumerate(
        zip(lengths.to_pylist(), pc.list_value_length(times).to_pylist(), strict=True)
    ):
        if not events or events != stamps:
            raise UserError(
                f"{users}: row {row}: {events or 'no'} item_ids and {stamps or 'no'} timestamps: expected at least one "
                "event and as many timestamps as items"
            )
    index = _item_index(raw, catalogue, users)
    request = [stamps[-1] for stamps in times.to_pylist()]
    if REQUEST_TIME in table.column_names:
        if not pa.types.is_integer(table.schema.field(REQUEST_TIME).type) or table[REQUEST_TIME].null_count:
            raise UserError(f"{users}: column {REQUEST_TIME!r}: expected an integer in every row")
        request = table[REQUEST_TIME].to_pylist()
    return pa.table(
        {
            "user_id": table["user_id"],
            "item_ids": pa.ListArray.from_arrays(raw.offsets, index),
            "timestamps": times,
            REQUEST_TIME: pa.array(request, pa.int64()),
        }
    )


def _list_column(table: pa.Table, users: Path, name: str) -> Any:
    column = table[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise UserError(f"{users}: column {name!r} holds {column.type}, expected a list in each row")
    if column.null_count or column.flatten().null_count:
        raise UserError(f"{users}: column {name!r} has a null: expected a value in every row and event")
    return column.cast(pa.list_(column.type.value_type))


def _item_index(raw: Any, catalogue: pa.Array, users: Path) -> pa.Array:
    """Item indices of all events, row after row."""
    events = raw.flatten()
    try:
        index = pc.index_in(events.cast(catalogue.type), catalogue)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{users}: column 'item_ids' holds {events.type}, expected the raw ids of the training data ({catalogue.type})"
        ) from error
    if index.null_count:
        event = pc.index(pc.is_null(index), True).as_py()
        row = pc.list_parent_indices(raw)[event].as_py()
        raise UserError(
            f"{users}: row {row}: item {events[event].as_py()!r} is unknown: expected one of the {len(catalogue)} items "
            "of the training data (items.parquet)"
        )
    return index.cast(pa.int64())


def _batch(table: pa.Table, max_seq_len: int, world: World) -> tuple[SequenceBatch, tuple[Tensor, Tensor]]:
    """This rank's rows as a batch of newest windows, and the items that each history holds, with their offsets."""
    share = -(-table.num_rows // world.size)
    rows = range(min(world.rank * share, table.num_rows), min((world.rank + 1) * share, table.num_rows))
    histories = [table["item_ids"][row].as_py() for row in rows]
    items = [history[-max_seq_len:] for history in histories]
    times = [[*table["timestamps"][row].as_py()[-max_seq_len:], table[REQUEST_TIME][row].as_py()] for row in rows]
    flat = torch.tensor([item for history in items for item in history], dtype=torch.int64)
    batch = SequenceBatch(
        item_ids=flat,
        seq_offsets=torch.tensor([0, *map(len, items)]).cumsum(0),
        timestamps=torch.tensor([time for history in times for time in history], dtype=torch.int64),
        target_ids=torch.zeros_like(flat),  # nothing is predicted but the next item
        user_rows=torch.tensor(list(rows), dtype=torch.int64),
    )
    seen = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    seen_offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
    return batch.to(world.device), (seen.to(world.device), seen_offsets.to(world.device))


def _result(table: pa.Table, items: Tensor, scores: Tensor, catalogue: pa.Array) -> pa.Table:
    found = items >= 0
    offsets = pa.array([0, *found.sum(1).cumsum(0).tolist()], pa.int32())
    indices = pa.array(items[found].cpu().numpy())
    return pa.table(
        {
            "user_id": table["user_id"],
            "item_ids": pa.ListArray.from_arrays(offsets, catalogue.take(indices)),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[found].cpu().numpy())),
        }
    )


def _write_whole(table: pa.Table, output: Path) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
