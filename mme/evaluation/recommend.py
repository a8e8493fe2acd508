"""Top-K items for histories in Parquet, in the item ids of the raw data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mme.config import USER_ID, Config, ModelConfig, load_run_config
from mme.data.batch import SequenceBatch
from mme.data.description import read_info
from mme.data.features import feature_sizes, read_vocabularies
from mme.data.numbering import numbering_sha256, read_item_ids
from mme.data.parts import check_files, read_user_ids
from mme.distributed.checkpoint import load_weights
from mme.distributed.recommender import Recommender
from mme.distributed.world import World, process_group
from mme.errors import UserError, first_line
from mme.evaluation.ranking import Ranker
from mme.files import replacing

REQUEST_TIME = "request_timestamp"
NUMBERS = "numbers of "  # before the name of a column: what holds the numbers of its values


def recommend(run: Path, users: Path, top_k: int, output: Path) -> int:
    """Writes the ``top_k`` best unseen items of each history; returns the number of histories.

    Args:
        run: a run's folder; its best checkpoint is used.
        users: Parquet with `user_id`, `item_ids` (list of raw item ids, oldest first), `timestamps` (list of integer
            seconds) and, if wanted, `request_timestamp` (integer seconds: when the recommendation is asked for;
            default: the time of the last event). Of each column that `model.event_features` names a list with a value an
            event, of `model.user_features` a value (or such a list, of which the first event read counts); what is
            missing or not in the training data counts as unknown.
        output: Parquet with `user_id`, `item_ids` (list of raw item ids, best first) and `scores` (list of float),
            written whole or not at all.

    Raises:
        UserError: a file, column, row or item is missing, unknown or of the wrong type, or a history is empty.
    """
    config = load_run_config(run)
    with process_group() as world:
        data, model = Path(config.data.path), config.model
        info = read_info(data)
        check_files(data, info)
        sizes = feature_sizes(data, info, model.feature_columns)
        catalogue = read_item_ids(data)
        histories = _read_histories(users, catalogue)
        histories = _with_features(histories, users, model, data, info)
        recommender = Recommender(config, info["num_items"], world, sizes)
        load_weights(run, None, recommender, numbering_sha256(data, info, model.feature_columns))
        ranker = Ranker(recommender)
        results = []
        for start in range(0, histories.num_rows, config.data.eval_batch_size * world.size):
            table = histories.slice(start, config.data.eval_batch_size * world.size)
            batch, seen = _batch(table, config, world)
            items, scores = ranker.top_k(batch, seen[0], seen[1], top_k)
            results.append(_result(table, items, scores, catalogue))
        if world.rank == 0:
            _write_whole(pa.concat_tables(results), output)
    return histories.num_rows


def _read_histories(users: Path, catalogue: pa.Array) -> pa.Table:
    """The histories with item indices in place of raw ids, checked row by row."""
    try:
        table = pq.read_table(users)
    except FileNotFoundError as error:
        raise UserError(f"{users}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{users}: not a readable Parquet file ({first_line(error)})") from error
    for column in ("user_id", "item_ids", "timestamps"):
        if column not in table.column_names:
            raise UserError(f"{users}: no column {column!r} (found: {', '.join(table.column_names)})")
    if table.num_rows == 0:
        raise UserError(f"{users}: no rows: expected one history a row")
    raw = _list_column(table, users, "item_ids")
    times = _list_column(table, users, "timestamps")
    if not pa.types.is_integer(times.type.value_type):
        raise UserError(f"{users}: column 'timestamps' holds {times.type.value_type}, expected integer seconds")
    times = _as_int64(times, pa.list_(pa.int64()), users, "timestamps")
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
        request = _as_int64(table[REQUEST_TIME], pa.int64(), users, REQUEST_TIME).to_pylist()
    given = {name: table[name] for name in table.column_names}
    index_lists = pa.ListArray.from_arrays(raw.offsets, index)
    return pa.table(
        {**given, "item_ids": index_lists, "timestamps": times, REQUEST_TIME: pa.array(request, pa.int64())}
    )


def _with_features(
    histories: pa.Table, users: Path, model: ModelConfig, dataset: Path, info: dict[str, Any]
) -> pa.Table:
    """The histories with the numbers of their features' values in columns `NUMBERS` + name."""
    vocabularies = read_vocabularies(dataset, [name for name in model.feature_columns if name != USER_ID])
    lengths = pc.list_value_length(histories["item_ids"]).combine_chunks()
    for name in model.feature_columns:
        key = "event_features" if name in model.event_features else "user_features"
        if name not in histories.column_names:
            raise UserError(f"{users}: no column {name!r}, which the model reads (model.{key})")
        column = histories[name].combine_chunks()
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if key == "event_features" and not is_list:
            raise UserError(f"{users}: column {name!r} holds {column.type}, expected a list with a value an event")
        if is_list and not pc.list_value_length(column).cast(lengths.type).equals(lengths):
            raise UserError(f"{users}: column {name!r}: expected as many values as item_ids in each row")
        try:
            if name == USER_ID:
                numbers = _user_numbers(column, users, dataset, info)
            else:
                numbers = pa.array(vocabularies[name].find(column.flatten() if is_list else column))
        except TypeError as error:
            raise UserError(f"{users}: column {name!r} {error}") from error
        if is_list:
            numbers = pa.LargeListArray.from_arrays(np.append(0, np.cumsum(lengths)), numbers)
        histories = histories.append_column(NUMBERS + name, numbers)
    return histories


def _user_numbers(column: pa.Array, users: Path, dataset: Path, info: dict[str, Any]) -> pa.Array:
    """One and the row of each user in the training data; 0 for one that it did not have."""
    known = pa.concat_arrays([ids for part in info["parts"] for ids in read_user_ids(dataset, part)])
    return pc.add(_places(column, known, users, USER_ID).fill_null(-1), 1)


def _places(ids: pa.Array, known: pa.Array, users: Path, column: str) -> pa.Array:
    """Where each raw id stands among those of the training data; null where it does not."""
    try:
        return pc.index_in(ids.cast(known.type), known)
    except pa.ArrowException as error:
        raise UserError(
            f"{users}: column {column!r} holds {ids.type}, expected the raw ids of the training data ({known.type})"
        ) from error


def _list_column(table: pa.Table, users: Path, name: str) -> Any:
    column = table[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise UserError(f"{users}: column {name!r} holds {column.type}, expected a list in each row")
    if column.null_count or column.flatten().null_count:
        raise UserError(f"{users}: column {name!r} has a null: expected a value in every row and event")
    return column.cast(pa.list_(column.type.value_type))


def _as_int64(column: Any, kind: pa.DataType, users: Path, name: str) -> Any:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        raise UserError(f"{users}: column {name!r}: {first_line(error)}") from error


def _item_index(raw: Any, catalogue: pa.Array, users: Path) -> pa.Array:
    """Item indices of all events, row after row."""
    events = raw.flatten()
    index = _places(events, catalogue, users, "item_ids")
    if index.null_count:
        event = pc.index(pc.is_null(index), True).as_py()
        row = pc.list_parent_indices(raw)[event].as_py()
        raise UserError(
            f"{users}: row {row}: item {events[event].as_py()!r} is unknown: expected one of the {len(catalogue)} items "
            "of the training data (items.parquet)"
        )
    return index.cast(pa.int64())


def _batch(table: pa.Table, config: Config, world: World) -> tuple[SequenceBatch, tuple[Tensor, Tensor]]:
    """This rank's rows as a batch of newest windows, and the items that each history holds, with their offsets."""
    window, model = config.history_len, config.model
    share = -(-table.num_rows // world.size)

    def of_window(name: str, row: int) -> list[int]:
        """The numbers of a history's values in the window that is read; of a column with one value a row that one."""
        value = table[NUMBERS + name][row].as_py()
        return value[-window:] if isinstance(value, list) else [value]

    rows = range(min(world.rank * share, table.num_rows), min((world.rank + 1) * share, table.num_rows))
    histories = [table["item_ids"][row].as_py() for row in rows]
    items = [history[-window:] for history in histories]
    times = [[*table["timestamps"][row].as_py()[-window:], table[REQUEST_TIME][row].as_py()] for row in rows]
    flat = torch.tensor([item for history in items for item in history], dtype=torch.int64)
    batch = SequenceBatch(
        item_ids=flat,
        seq_offsets=torch.tensor([0, *map(len, items)]).cumsum(0),
        timestamps=torch.tensor([time for history in times for time in history], dtype=torch.int64),
        target_ids=torch.zeros_like(flat),  # nothing is predicted but the next item
        user_rows=torch.tensor(list(rows), dtype=torch.int64),
        event_features=_side_by_side(
            [[value for row in rows for value in of_window(name, row)] for name in model.event_features]
        ),
        user_features=_side_by_side([[of_window(name, row)[0] for row in rows] for name in model.user_features]),
    )
    seen = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    seen_offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
    return batch.to(world.device), (seen.to(world.device), seen_offsets.to(world.device))


def _side_by_side(columns: list[list[int]]) -> Tensor | None:
    return torch.tensor(columns, dtype=torch.int64).T if columns else None


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
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        pq.write_table(table, partial)
