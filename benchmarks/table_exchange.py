"""How much does one exchange of distinct ids save, compared with a lookup for each table?

    torchrun --nproc-per-node 2 -m benchmarks.table_exchange --json benchmarks/results/table_exchange_2cpu.json

Measures three forms of the same lookup on all processes of the group, forward and backward with the update of the tables:

    ours             sends the distinct ids of the batch once for all M tables
    distinct ids     sends the same ids once for each table
    every use        sends all ids of inputs, targets and negatives, with repetitions, once for each table
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.json_file import write_json
from mme.config import Config, load_config
from mme.distributed.tables import ItemTables
from mme.distributed.world import World, process_group


def main(
    items: Annotated[int, typer.Option(help="rows of a table")] = 100_000,
    tables: Annotated[int, typer.Option(help="M")] = 4,
    dim: Annotated[int, typer.Option(help="width of a table, d")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens per process")] = 4096,
    negatives: Annotated[int, typer.Option(help="negatives per group of 64 tokens")] = 128,
    repeats: Annotated[int, typer.Option(help="repetitions of each form; the forms alternate")] = 15,
    json_path: Annotated[Optional[Path], typer.Option("--json")] = None,  # noqa: UP045  (typer on Python 3.10)
) -> None:
    """Prints the table on the first process and, with --json, writes it."""
    with process_group() as world:
        torch.manual_seed(world.rank)
        # Half of the uses are of one of a hundred popular items.
        uses = torch.randint(items, (2 * tokens + tokens // 64 * negatives,))
        popular = torch.rand(uses.shape) < 0.5
        uses = torch.where(popular, uses % 100, uses).to(world.device)
        distinct = uses.unique()
        together = ItemTables(_config(tables, dim), items, world)
        separate = [ItemTables(_config(1, dim), items, world) for _ in range(tables)]
        forms: dict[str, tuple[Tensor, Callable[[], None]]] = {
            "ours": (distinct, lambda: _lookup_and_update([together], distinct)),
            "distinct ids, each table": (distinct, lambda: _lookup_and_update(separate, distinct)),
            "every use, each table": (uses, lambda: _lookup_and_update(separate, uses)),
        }
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(repeats + 1):
            for name, (_, run) in forms.items():
                world.barrier()
                started = time.perf_counter()
                run()
                _wait(world)
                times[name].append(1e3 * (time.perf_counter() - started))
        if world.rank == 0:
            rows = [
                _row(name, ids.numel(), len(separate) if "each" in name else 1, tables * dim, times[name][1:])
                for name, (ids, _) in forms.items()
            ]
            _report(rows, world, {"items": items, "tables": tables, "dim": dim, "tokens": tokens}, json_path)


def _config(tables: int, dim: int) -> Config:
    overrides = ["data.path=unused", f"model.num_tables={tables}", f"model.embedding_dim={tables * dim}"]
    # The optimizer is fused into backward, so that no time of a dense optimizer hides the exchange.
    return load_config(None, [*overrides, "model.moe.num_experts=0", "train.table_optimizer=adagrad"])


def _lookup_and_update(tables: list[ItemTables], ids: Tensor) -> None:
    rows = torch.cat([table.lookup(ids) for table in tables], dim=1)
    rows.backward(torch.ones_like(rows))
    for table in tables:
        table.step()


def _row(form: str, num_ids: int, exchanges: int, width: int, times: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4)
    kib = (8 * num_ids * exchanges + 2 * 4 * num_ids * width) / 1024  # ids out, rows back, gradients out
    figures = {"ms": median, "spread_ms": (high - low) / 2}
    return {"form": form, "ids": num_ids, "exchanges": 3 * exchanges, "exchanged_kib": kib, **figures}


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _report(rows: list[dict[str, Any]], world: World, shape: dict[str, int], path: Path | None) -> None:
    table = Table(
        title=f"Lookup and update of {shape['tables']} tables on {world.size} processes ({world.device.type})"
    )
    for column in ("form", "ids", "exchanges", "KiB per process", "ms", "± ms", "ratio"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        ratio = row["ms"] / rows[0]["ms"]
        figures = (f"{row['exchanged_kib']:.0f}", f"{row['ms']:.1f}", f"{row['spread_ms']:.1f}", f"{ratio:.2f}")
        table.add_row(row["form"], str(row["ids"]), str(row["exchanges"]), *figures)
    Console(width=110).print(table)
    if path is not None:
        header = {"processes": world.size, "device": world.device.type, "torch": torch.__version__, **shape}
        write_json(path, header | {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
