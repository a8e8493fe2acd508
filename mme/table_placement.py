"""Where the item tables live: the one answer that the plan, a job's first lines, its metrics and its report give.

A table of a GPU job is in GPU memory (`device`), in host memory that the GPU reads over its link (`uvm`, unified virtual
memory), or there with a cache of recently used rows in GPU memory (`uvm_caching`). `launcher plan` predicts the parts of
each table; training takes them from TorchRec's plan (`mme.distributed.table_plan`). Both count bytes here.

FBGEMM keeps an optimizer state of one value per row on the GPU, and any other state beside the weights of its table. A
cache holds weights only.

Legend: M tables, R rows, d view width, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from mme.config import Config
from mme.devices import Device, in_words
from mme.errors import UserError

FLOAT = 4  # bytes of a number in an optimizer state
WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STATES = {"adam": 2, "dense_adam": 2, "adagrad": 1, "rowwise_adagrad": 0, "sgd": 0}  # copies of the weights
ROW_STATES = {"rowwise_adagrad": 1}  # values per row
LEAST_COLUMNS = 128  # column-wise sharding makes no narrower parts (TorchRec's MIN_CW_DIM)
WIDEST = 1024  # columns of a stored table; FBGEMM's kernels are made for rows of at most 1,024 or 2,048 numbers
AUTO_SHARE = 0.8  # `auto` keeps tables in GPU memory if they fill at most this share, which leaves the rest to the step
CACHE_ROW_BYTES, CACHE_SLOT_BYTES = 4, 16  # FBGEMM's index of each row, and the id and age in each slot of the cache


@dataclass(frozen=True)
class Parts:
    """How one table is divided.

    Attributes:
        number: parts of the table.
        rows, columns: size of the largest part.
        holders: ranks that hold a part.
    """

    number: int
    rows: int
    columns: int
    holders: int

    @property
    def on_one_rank(self) -> int:
        """The most parts that one rank holds."""
        return math.ceil(self.number / self.holders)


@dataclass(frozen=True)
class Bytes:
    """Memory of tables, by what it holds and where."""

    device_weights: float
    device_states: float
    host_weights: float
    host_states: float

    @property
    def device(self) -> float:
        return self.device_weights + self.device_states

    @property
    def host(self) -> float:
        return self.host_weights + self.host_states

    def times(self, number: float) -> Bytes:
        return Bytes(
            *(
                number * value
                for value in (self.device_weights, self.device_states, self.host_weights, self.host_states)
            )
        )


@dataclass(frozen=True)
class TablePlacement:
    """Where one item table lives.

    Attributes:
        rows, columns: size of the whole table.
        holders: of the job's ``ranks``, those that hold a part of it.
        cache_load_factor: share of the rows that fit into the cache; None without a cache.
        on_gpu: whether the ranks' device is a GPU.
        device_bytes, host_bytes: on the rank with most of the table: weights, optimizer states and cache.
    """

    table: str
    rows: int
    columns: int
    sharding: str
    placement: str
    holders: int
    ranks: int
    on_gpu: bool
    device_bytes: int
    host_bytes: int
    cache_load_factor: float | None = None
    dtype: str = "float32"

    @classmethod
    def of(
        cls,
        config: Config,
        table: int,
        num_rows: int,
        sharding: str,
        parts: Parts,
        placement: str,
        ranks: int,
        on_gpu: bool,
    ) -> TablePlacement:
        """The placement of table number ``table``, divided into ``parts``."""
        views = views_together(config, sharding, ranks)
        found = bytes_of(config, parts.rows, parts.columns, placement, views).times(parts.on_one_rank)
        return cls(
            table=f"item_{table}",
            rows=num_rows,
            columns=config.model.view_dim,
            sharding=sharding,
            placement=placement,
            holders=parts.holders,
            ranks=ranks,
            on_gpu=on_gpu,
            device_bytes=round(found.device),
            host_bytes=round(found.host),
            cache_load_factor=config.parallel.table_cache_load_factor if placement == "uvm_caching" else None,
            dtype=config.parallel.table_dtype,
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TablePlacement:
        """The placement that a line of metrics.jsonl describes, which may have further keys."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    @property
    def where(self) -> str:
        """Sharding and memory in words."""
        holders = f"{self.sharding} on {self.holders} of {self.ranks} ranks"
        if not self.on_gpu:
            return f"{holders}, in memory ({in_words(self.device_bytes)} on a rank)"
        on_gpu, on_host = in_words(self.device_bytes), in_words(self.host_bytes)
        match self.placement:
            case "device":
                return f"{holders}, in GPU memory ({on_gpu} on a rank)"
            case "uvm":
                more = f", {on_gpu} of GPU memory" if self.device_bytes else ""
                return f"{holders}, in host memory ({on_host} on a rank{more})"
            case _:
                return (
                    f"{holders}, in host memory ({on_host} on a rank) with a cache of {self.cache_load_factor:.0%} of the rows "
                    f"in GPU memory ({on_gpu})"
                )


def in_lines(placements: Iterable[TablePlacement]) -> list[str]:
    """One line for each run of tables that differ only in their names, such as ``item_0 to item_3: each …``."""
    lines = []
    for _, group in groupby(placements, key=lambda placement: replace(placement, table="")):
        same = list(group)
        names = f"{same[0].table} to {same[-1].table}: each " if len(same) > 1 else f"{same[0].table}: "
        dtype = "" if same[0].dtype == "float32" else f" in {same[0].dtype}"
        lines.append(f"{names}{same[0].rows:,} × {same[0].columns}{dtype}, {same[0].where}")
    return lines


def bytes_of(config: Config, rows: int, columns: int, placement: str, views: int) -> Bytes:
    """Bytes of a part of an item table of ``rows`` × ``columns`` with its optimizer states and cache.

    ``views`` tables share the index of a cache, see `views_together`.
    """
    optimizer, load_factor = config.train.table_optimizer, config.parallel.table_cache_load_factor
    weights = float(rows * columns * WEIGHT_BYTES[config.parallel.table_dtype])
    states, row_states = (
        float(rows * columns * FLOAT * STATES[optimizer]),
        float(rows * ROW_STATES.get(optimizer, 0) * FLOAT),
    )
    match placement:
        case "device":
            return Bytes(weights, states + row_states, 0, 0)
        case "uvm":
            return Bytes(0, row_states, weights, states)
        case _:
            cache = load_factor * weights + rows * (CACHE_ROW_BYTES + CACHE_SLOT_BYTES * load_factor) / views
            return Bytes(cache, row_states, weights, states)


def parts_of(config: Config, sharding: str, num_rows: int, ranks: int) -> Parts:
    """How TorchRec divides each of the M tables by ``sharding``."""
    d = config.model.view_dim
    match sharding:
        case "row_wise":
            rows = math.ceil(num_rows / ranks)
            return Parts(ranks, rows, d, math.ceil(num_rows / rows))
        case "column_wise":
            wide = (columns for columns in range(LEAST_COLUMNS, d, 4) if d % columns == 0)
            columns = next(wide, d)
            return Parts(d // columns, num_rows, columns, min(d // columns, ranks))
        case "table_wise":
            return Parts(1, num_rows, d, 1)
        case _:
            return Parts(ranks, num_rows, d, ranks)


def views_together(config: Config, sharding: str, ranks: int) -> int:
    """The number of item tables that are stored side by side in one wide table, so that ids are sent once for all of them.

    A state of one value per row belongs to one table, `dense_adam` needs memory for a whole stored table, and `column_wise` and
    `auto` divide the tables themselves: these keep the tables apart. With `table_wise` tables of one rank are together.
    """
    model = config.model
    if config.train.table_optimizer in ("rowwise_adagrad", "dense_adam") or sharding in ("column_wise", "auto"):
        return 1
    apart = min(model.num_tables, ranks) if sharding == "table_wise" else 1
    held = math.ceil(model.num_tables / ranks)
    for stored in range(apart, model.num_tables):
        views = model.num_tables // stored
        evenly = sharding != "table_wise" or math.ceil(stored / ranks) * views == held
        if model.num_tables % stored == 0 and views * model.view_dim <= WIDEST and evenly:
            return views
    return 1


def parts_on_fullest_rank(config: Config, sharding: str, num_rows: int, ranks: int) -> int:
    """The most parts of all tables that one rank holds."""
    return math.ceil(config.model.num_tables * parts_of(config, sharding, num_rows, ranks).number / ranks)


def on_fullest_rank(config: Config, sharding: str, num_rows: int, ranks: int, placement: str) -> Bytes:
    """Bytes of all tables on the rank that holds most of them."""
    parts = parts_of(config, sharding, num_rows, ranks)
    held = parts_on_fullest_rank(config, sharding, num_rows, ranks)
    return bytes_of(config, parts.rows, parts.columns, placement, views_together(config, sharding, ranks)).times(held)


def choose_placement(config: Config, num_rows: int, ranks: int, device: Device) -> str:
    """`parallel.table_placement`, or what `auto` stands for: host memory, see `host_placement`, only for tables that the GPU cannot hold.

    Raises:
        UserError: the device does not have the placement, or tables of `parallel.table_dtype`.
    """
    _check_dtype(config, device)
    wanted, sharding = config.parallel.table_placement, config.parallel.table_sharding
    if not device.is_gpu:
        if wanted not in ("auto", "device"):
            raise UserError(
                f"parallel.table_placement={wanted} needs a GPU, and the processes run on a CPU: expected auto or device"
            )
        return "device"
    if wanted != "auto":
        return wanted
    if sharding == "data_parallel" or config.train.table_optimizer == "dense_adam":  # see `mme.config.rules`
        return "device"
    needed = on_fullest_rank(config, "row_wise" if sharding == "auto" else sharding, num_rows, ranks, "device")
    return "device" if needed.device <= AUTO_SHARE * device.memory else host_placement(config)


def host_placement(config: Config) -> str:
    """The better placement in host memory; FBGEMM's cache has no bfloat16, see `mme.config.rules`."""
    return "uvm" if config.parallel.table_dtype == "bfloat16" else "uvm_caching"


def _check_dtype(config: Config, device: Device) -> None:
    dtype = config.parallel.table_dtype
    if device.is_gpu or dtype == "float32":
        return
    if dtype == "bfloat16":
        raise UserError("parallel.table_dtype=bfloat16: on a CPU FBGEMM has float32 and float16: expected one of them")
    if config.train.table_optimizer == "adam":
        raise UserError(
            f"parallel.table_dtype={dtype}: on a CPU train.table_optimizer=adam updates only float32: expected float32, or "
            "adagrad, rowwise_adagrad or sgd"
        )


def shortfall(needed: Bytes, device: Device, placement: str) -> str | None:
    """Says which memory of a rank the tables do not fit into; None if they fit."""
    tables = "the item tables and their optimizer states"
    on_device = "the cache of the item tables" if placement == "uvm_caching" else tables
    for kind, what, need, has in (
        ("GPU memory" if device.is_gpu else "memory", on_device, needed.device, device.memory),
        ("host memory", tables, needed.host, device.host_memory),
    ):
        if need > has:
            return f"the fullest rank needs {in_words(need)} of {kind} for {what}, and has {in_words(has)}"
    return None


def require_room(config: Config, needed: Bytes, device: Device, placement: str) -> None:
    """Raises UserError if the tables of the fullest rank do not fit into its memory."""
    found = shortfall(needed, device, placement)
    if found is None:
        return
    advice = {
        "device": "uvm_caching, more processes" if device.is_gpu else "more memory, or more nodes",
        "uvm": "more processes on more nodes",
        "uvm_caching": "a smaller parallel.table_cache_load_factor, uvm, more processes",
    }[placement]
    raise UserError(
        f"parallel.table_placement={placement}: {found}: expected {advice}, a narrower model or another train.table_optimizer"
    )


def predict(config: Config, num_rows: int, ranks: int, device: Device) -> Sequence[TablePlacement]:
    """Where the tables will live with a configured sharding (not `auto`).

    Raises:
        UserError: see `choose_placement`.
    """
    sharding = config.parallel.table_sharding
    parts, placement = parts_of(config, sharding, num_rows, ranks), choose_placement(config, num_rows, ranks, device)
    return [
        TablePlacement.of(config, table, num_rows, sharding, parts, placement, ranks, device.is_gpu)
        for table in range(config.model.num_tables)
    ]
