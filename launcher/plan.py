"""`plan` predicts the memory and time of a job on given GPUs and chooses its layout, without needing the GPUs.

It evaluates the models of memory (`launcher.memory`) and time (`launcher.step_time`) for every table sharding and
expert-parallel size that the job allows, chooses the fastest that fits and shows it part by part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from launcher.job import Job, items_of
from launcher.memory import Memory, evaluation_memory, memory_of, step_memory
from launcher.shape import Shape
from launcher.step_time import PartTime, time_parts, total_s
from mme.config.rules import validate
from mme.devices import Device, device_of, in_words
from mme.errors import UserError
from mme.table_placement import host_placement, in_lines
from mme.table_placement import predict as predict_tables

SHARDINGS = ("row_wise", "column_wise", "table_wise", "data_parallel")
SHOWN = 8  # layouts in the printed table
WORTH_CHANGING = 0.95  # another layout must take less than this share of the configured one's time
MOST_NODES = 1024


@dataclass(frozen=True)
class ParallelLayout:
    """A table sharding and an expert-parallel size, with their predicted memory and time."""

    shape: Shape
    memory: Memory
    time: dict[str, PartTime]

    @property
    def step_s(self) -> float:
        return total_s(self.time)

    @property
    def overrides(self) -> str:
        text = f"parallel.table_sharding={self.shape.config.parallel.table_sharding}"
        experts = f" parallel.expert_parallel_size={self.shape.expert_parallel_size}"
        return text + experts * bool(self.shape.expert_blocks)


def show_plan(
    job: Job, gpu: str, items: int | None, host_memory_gib: float | None = None, *, choose: bool = True
) -> None:
    """Prints layout, memory, time and assumptions of ``job`` on devices called ``gpu``.

    With ``choose`` this is the best layout that fits, otherwise the configured one. ``host_memory_gib`` is that of a node;
    None: see `mme.devices`.

    Raises:
        UserError: the device is unknown, neither ``items`` nor a data set gives the number of items, or nothing fits.
    """
    device = device_of(gpu, job.nproc_per_node)
    if host_memory_gib is not None:
        if not 0 < host_memory_gib < math.inf:
            raise UserError(f"--host-memory {host_memory_gib}: expected a positive number of GiB")
        host_memory = host_memory_gib * 2**30 / job.nproc_per_node
        device = replace(device, host_memory=host_memory, memory=device.memory if device.is_gpu else host_memory)
    config = job.load()
    shape = Shape(
        config, job.nnodes * job.nproc_per_node, job.nproc_per_node, items or items_of(config),
        "cuda" if device.is_gpu else "cpu",
    )  # fmt: skip
    configured = _configured(shape)
    if not choose and configured is None:
        raise UserError("parallel.table_sharding (auto): TorchRec chooses it at the start; leave out --as-configured")
    found = layouts(shape, device) if choose or configured is None else [predict(configured, device)]
    best = choice(found, configured, device)
    console = Console()
    console.print(f"{job.nnodes} × {job.nproc_per_node} {gpu}, {shape.items:,} items", highlight=False)
    if len(found) > 1:
        console.print(_choices(found, best, configured, device))
    console.print(_table("Placement", {key: (value,) for key, value in placement(best.shape, device).items()}))
    title = f"Peak memory of the fullest rank, during the {best.memory.phase}"
    console.print(_table(title, _shares(best.memory.parts, in_words)))
    if best.memory.host_parts:
        console.print(_table("Host memory of that rank", _shares(best.memory.host_parts, in_words)))
    step, evaluation = (in_words(of(best.shape, device).total) for of in (step_memory, evaluation_memory))
    console.print(f"peak of a step: {step}, of an evaluation: {evaluation}", highlight=False)
    seconds = {name: part.seconds for name, part in best.time.items()}
    times = _shares(seconds, lambda value: f"{1e3 * value:.2f} ms")
    bounds = {name: part.bound for name, part in best.time.items()}
    console.print(
        _table("Time of a step", {name: (*cells, bounds.get(name, "")) for name, cells in times.items()}, "bound by")
    )
    tokens_per_s = best.shape.ranks * best.shape.tokens / best.step_s
    console.print(f"tokens/s, all ranks: {tokens_per_s:,.0f}", highlight=False)
    for line in assumptions(best.shape, device):
        console.print(f"- {line}", highlight=False)
    if not best.memory.fits(device):
        raise UserError(_refusal(best, device))
    if choose:
        console.print(f"to train with this layout: {best.overrides}", highlight=False, soft_wrap=True)


def predict(shape: Shape, device: Device) -> ParallelLayout:
    return ParallelLayout(shape, memory_of(shape, device), time_parts(shape, device))


def layouts(shape: Shape, device: Device) -> list[ParallelLayout]:
    """All possible layouts of ``shape``, fastest first."""
    experts = shape.config.model.moe.num_experts
    most = math.gcd(experts, shape.ranks) if experts else 1
    found = [
        predict(_laid_out(shape, sharding, size), device)
        for sharding in SHARDINGS
        if _is_allowed(shape, sharding)
        for size in range(1, most + 1)
        if most % size == 0
    ]
    return sorted(found, key=lambda layout: (layout.step_s, layout.memory.total))


def _is_allowed(shape: Shape, sharding: str) -> bool:
    """Whether training accepts the sharding, see `mme.config.rules`."""
    try:
        validate(_laid_out(shape, sharding, shape.expert_parallel_size).config)
    except UserError:
        return False
    return True


def choice(found: list[ParallelLayout], configured: Shape | None, device: Device) -> ParallelLayout:
    """The fastest layout that fits, or the configured one if it is hardly slower. If none fits, the smallest."""
    fitting = [layout for layout in found if layout.memory.fits(device)]
    if not fitting:
        return min(
            found,
            key=lambda layout: max(layout.memory.total / device.memory, layout.memory.host_total / device.host_memory),
        )
    fastest = min(fitting, key=lambda layout: layout.step_s)
    own = [layout for layout in fitting if layout.shape == configured]
    return own[0] if own and fastest.step_s > WORTH_CHANGING * own[0].step_s else fastest


def placement(shape: Shape, device: Device) -> dict[str, str]:
    """Where tables, decoder and experts are placed."""
    model, size = shape.config.model, shape.expert_parallel_size
    found = {
        "item tables": "; ".join(in_lines(predict_tables(shape.config, shape.items, shape.ranks, device))),
        "decoder": f"{shape.dense_parameters:,} weights on every rank, optimizer states split {shape.ranks} ways",
    }
    if shape.expert_blocks:
        each = model.moe.num_experts // size
        reach = "within a node" if size <= shape.ranks_per_node else "across nodes"
        found["experts"] = (
            f"{model.moe.num_experts} in each of {shape.expert_blocks} blocks: {each} on each of {size} ranks, "
            f"{shape.expert_copies} copies"
            + (f"; rank r holds {each} from expert {each}·(r mod {size}) on, exchanged {reach}" if size > 1 else "")
        )
    return found


def assumptions(shape: Shape, device: Device) -> list[str]:
    """The assumptions behind the figures, as lines for the reader."""
    precision = shape.precision
    flops = device.bfloat16_flops if precision == "bfloat16" else device.float32_flops
    lines = [
        f"this is a cost model; its times were not fitted to a GPU. It assumes {device.efficiency:.0%} of the peaks "
        f"({flops / 1e12:.1f} TFLOP/s {precision}, {device.memory_bytes_per_s / 1e12:.2f} TB/s, "
        f"{device.local_bytes_per_s / 1e9:.0f} GB/s in a node, {device.network_bytes_per_s / 1e9:.0f} GB/s between nodes)",
        f"every rank has {shape.tokens:,} tokens (worst case: all sequences have full length), experts are evenly loaded, "
        f"and a step has {shape.distinct_items:,} distinct items (drawn uniformly)",
        "parts do not overlap: no communication is hidden behind arithmetic; data loading takes no time",
        f"a message takes {1e6 * device.local_latency_s:.0f} µs in a node and {1e6 * device.network_latency_s:.0f} µs "
        f"between nodes; the host takes {1e3 * device.host_step_s:.0f} ms per step and {1e3 * device.host_block_s:.0f} ms "
        "per block (guesses)",
    ]
    if device.is_gpu:
        lines.append(
            f"a rank may fill {in_words(device.memory)} of GPU memory and {in_words(device.host_memory)} of host memory"
        )
    else:
        lines.append(
            "a rank is one core of a machine like this; memory was checked against measured runs, time was not"
        )
    return [*lines, "docs/multi-node.md describes both models in full"]


def _refusal(layout: ParallelLayout, device: Device) -> str:
    """Says by how much the layout does not fit, which part is largest, and what would fit."""
    shape, memory = layout.shape, layout.memory
    largest = max(memory.parts, key=memory.parts.__getitem__)
    helps = []
    smaller = _smaller_batch(shape, device)
    if smaller is not None:
        helps.append(smaller)
    if in_host_memory := _in_host_memory(shape, device):
        helps.append(in_host_memory)
    nodes = 2 * shape.nodes
    while nodes <= MOST_NODES:
        wider = replace(shape, ranks=nodes * shape.ranks_per_node)
        if any(found.memory.fits(device) for found in layouts(wider, device)):
            helps.append(f"--nnodes {nodes}")
            break
        nodes *= 2
    if not helps:
        helps.append(f"nothing up to {MOST_NODES} nodes; try a narrower model or another train.table_optimizer")
    if memory.total <= device.memory:
        parts = ", ".join(f"{part} {in_words(size)}" for part, size in memory.host_parts.items())
        return (
            f"does not fit: the fullest rank needs {in_words(memory.host_total)} of host memory ({parts}), more than the "
            f"{in_words(device.host_memory)} assumed for a rank; what fits: {' or '.join(helps)}"
        )
    return (
        f"does not fit: the fullest rank needs {in_words(memory.total)}, {in_words(memory.total - device.memory)} more "
        f"than the {in_words(device.memory)} of a device; the largest part is {largest} "
        f"({in_words(memory.parts[largest])}); what fits: {' or '.join(helps)}"
    )


def _smaller_batch(shape: Shape, device: Device) -> str | None:
    """The override for the largest batch that fits, found by halving the configured one; None if there is none."""
    data = shape.config.data
    key, value, least = "batch_size", data.batch_size, 1
    if data.tokens_per_batch is not None:
        key, value, least = "tokens_per_batch", data.tokens_per_batch, data.max_seq_len
    if step_memory(shape, device).total <= device.memory:  # only the evaluation does not fit
        key, value, least = "eval_batch_size", data.eval_batch_size, 1
    while value // 2 >= least:
        value //= 2
        config = replace(shape.config, data=replace(data, **{key: value}))  # type: ignore[arg-type]
        if memory_of(replace(shape, config=config), device).fits(device):
            return f"data.{key}={value}"
    return None


def _in_host_memory(shape: Shape, device: Device) -> str | None:
    """The override that keeps the tables in host memory, if they fit there; None otherwise."""
    parallel = shape.config.parallel
    if not device.is_gpu or parallel.table_placement != "device" or shape.config.train.table_optimizer == "dense_adam":
        return None
    kind = host_placement(shape.config)
    moved = replace(shape.config, parallel=replace(parallel, table_placement=kind, table_sharding="row_wise"))  # type: ignore[arg-type]
    fits = memory_of(replace(shape, config=moved), device).fits(device)
    return f"parallel.table_placement={kind}" if fits else None


def _configured(shape: Shape) -> Shape | None:
    """The layout that training would use; None if TorchRec's planner chooses it."""
    sharding = shape.config.parallel.table_sharding
    return None if sharding == "auto" else _laid_out(shape, sharding, shape.expert_parallel_size)


def _laid_out(shape: Shape, sharding: str, expert_parallel_size: int) -> Shape:
    parallel = replace(shape.config.parallel, table_sharding=sharding, expert_parallel_size=expert_parallel_size)  # type: ignore[arg-type]  # one of SHARDINGS
    return replace(shape, config=replace(shape.config, parallel=parallel))


def _choices(found: list[ParallelLayout], best: ParallelLayout, configured: Shape | None, device: Device) -> Table:
    table = Table(title=f"Layouts, the {min(SHOWN, len(found))} fastest of {len(found)}", title_justify="left")
    for column in ("item tables", "ranks that share experts", "memory", "step", ""):
        table.add_column(column, justify="left" if column in ("item tables", "") else "right", overflow="fold")
    shown = [
        layout for number, layout in enumerate(found) if number < SHOWN or layout.shape in (best.shape, configured)
    ]
    for layout in shown:
        remarks = ["chosen"] if layout is best else []
        remarks += ["configured"] if layout.shape == configured else []
        remarks += ["does not fit"] if not layout.memory.fits(device) else []
        sharding, size = layout.shape.config.parallel.table_sharding, layout.shape.expert_parallel_size
        figures = (in_words(layout.memory.total), f"{1e3 * layout.step_s:.2f} ms")
        table.add_row(sharding, str(size) if layout.shape.expert_blocks else "", *figures, ", ".join(remarks))
    return table


def _shares(parts: dict[str, float], show: Callable[[float], str]) -> dict[str, tuple[str, ...]]:
    total = sum(parts.values())
    rows = {part: (show(value), f"{value / total:.0%}") for part, value in parts.items()}
    return {**rows, "total": (show(total), "")}


def _table(title: str, rows: dict[str, tuple[str, ...]], last: str = "") -> Table:
    width = max(len(cells) for cells in rows.values())
    table = Table(title=title, title_justify="left", show_header=bool(last))
    table.add_column()
    for column in range(width):
        named = last if column == width - 1 else ""
        table.add_column(named, justify="right" if width > 1 and not named else "left", overflow="fold")
    for part, cells in rows.items():
        table.add_row(part, *cells)
    return table
