"""Predicts, without a GPU, what a rank holds and how long a step takes, part by part.

A cost model, not a measurement: memory counts the tensors that training keeps; time is, for each part, the largest of
arithmetic, memory traffic and network at the rates below, and the parts follow one another. Every assumption is printed
with the result.

Legend: B sequences of a rank, N max_seq_len, T = B·N tokens, M views, D total width, d view width, H heads, E experts,
k top_k, f hidden width, U distinct items of a step, n negatives of a token, W ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher.findings import in_words
from launcher.job import Job
from mme import flops
from mme.config import Config
from mme.errors import UserError

FLOAT = 4  # bytes: weights, their gradients and optimizer states are float32
INT64 = 8


@dataclass(frozen=True)
class Gpu:
    """Published peaks of one GPU (SXM) and of its links, a direction."""

    memory: float  # bytes
    float32_flops: float  # without tensor cores
    bfloat16_flops: float  # with them, dense
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float  # one InfiniBand port a GPU


GPUS = {
    "a100-80g": Gpu(80e9, 19.5e12, 312e12, 2.04e12, 300e9, 25e9),  # HDR, 200 Gbit/s
    "h100-80g": Gpu(80e9, 67e12, 989e12, 3.35e12, 450e9, 50e9),  # NDR, 400 Gbit/s
}
EFFICIENCY = 0.5  # share of the peaks that kernels and links are taken to reach
RUNTIME_BYTES = 2e9  # CUDA context, NCCL's buffers, cuBLAS workspace
HOST_S_PER_STEP, HOST_S_PER_BLOCK = 5e-3, 1e-3  # launching kernels, TorchRec's and DeepSpeed's Python
TABLE_STATES = {"adam": 2.0, "adagrad": 1.0, "rowwise_adagrad": 0.0, "sgd": 0.0}  # copies of the weights
DENSE_STATES = 3  # ZeRO's own copy of the weights and Adam's two moments


@dataclass(frozen=True)
class Shape:
    """The sizes that all parts are computed from."""

    config: Config
    ranks: int
    ranks_per_node: int
    items: int

    def __post_init__(self) -> None:
        if self.config.model.block != "fuxi":
            raise UserError(f"model.block ({self.config.model.block}): the plan knows fuxi alone")

    @property
    def activation_bytes(self) -> int:
        """Of one number in the decoder."""
        return 2 if self.config.train.precision == "bfloat16" else FLOAT

    def flops_of(self, gpu: Gpu) -> float:
        return gpu.bfloat16_flops if self.config.train.precision == "bfloat16" else gpu.float32_flops

    @property
    def tokens(self) -> int:
        data = self.config.data
        return data.tokens_per_batch or data.batch_size * data.max_seq_len

    @property
    def rows(self) -> int:
        """Tokens of all views."""
        return self.tokens * self.config.model.num_tables

    @property
    def head_widths(self) -> tuple[int, int]:
        """H·dqk and H·dv."""
        return flops.head_widths(self.config.model)

    @property
    def hidden(self) -> int:
        return flops.hidden_dim(self.config.model)

    @property
    def expert_blocks(self) -> int:
        return flops.num_expert_blocks(self.config.model)

    @property
    def expert_parallel_size(self) -> int:
        experts = self.config.model.moe.num_experts
        return self.config.parallel.expert_parallel_size or (math.gcd(experts, self.ranks) if experts else 1)

    @property
    def distinct_items(self) -> int:
        """U, expected: draws are uniform over the catalogue, so that this is an upper bound for skewed ones."""
        loss = self.config.loss
        if loss.kind == "full_softmax":
            return self.items
        draws = 2 * self.tokens + self.negative_sets * loss.num_negatives
        return math.ceil(self.items * -math.expm1(-draws / self.items))

    @property
    def negative_sets(self) -> int:
        loss = self.config.loss
        if loss.negatives == "per_token":
            return self.tokens
        return math.ceil(self.tokens / (loss.negative_group_size or self.tokens))

    @property
    def table_elements(self) -> float:
        """Weights of the item tables on the fullest rank."""
        model, sharding = self.config.model, self.config.parallel.table_sharding
        whole = self.items * model.embedding_dim
        if sharding == "data_parallel":
            return whole
        if sharding in ("table_wise", "column_wise"):
            return math.ceil(model.num_tables / self.ranks) * self.items * model.view_dim
        return math.ceil(self.items / self.ranks) * model.embedding_dim

    @property
    def dense_parameters(self) -> int:
        """Weights that every rank holds: all but tables and experts."""
        model = self.config.model
        d, (qk, v) = model.view_dim, self.head_widths
        block = d * (4 * v + 2 * qk) + 3 * v * d + d + 129 + 2 * self.config.data.max_seq_len - 1
        ffn = (model.num_blocks - self.expert_blocks) * 3 * d * self.hidden
        router = self.expert_blocks * d * model.moe.num_experts
        positions = (model.num_tables if model.positions == "per_view" else 1) * self.config.data.max_seq_len * d
        return model.num_blocks * block + ffn + router + positions

    @property
    def expert_parameters(self) -> int:
        """Weights of the experts that one rank holds."""
        model = self.config.model
        experts = model.moe.num_experts // self.expert_parallel_size
        return self.expert_blocks * experts * 3 * model.view_dim * self.hidden


def show_plan(job: Job, gpu: str, items: int | None) -> None:
    """Prints placement, memory, time and assumptions of ``job`` on GPUs of the kind named.

    Raises:
        UserError: an unknown GPU, or neither ``items`` nor a data set that says how many there are.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: expected {' or '.join(GPUS)}")
    config = job.load()
    shape = Shape(config, job.nnodes * job.nproc_per_node, job.nproc_per_node, items or _items_of(config))
    memory, seconds = memory_parts(shape), time_parts(shape, job.nnodes, GPUS[gpu])
    total_bytes, total_s = sum(memory.values()), sum(seconds.values())
    console = Console()
    console.print(f"{job.nnodes} × {job.nproc_per_node} {gpu}, {shape.items:,} items", highlight=False)
    console.print(_table("Placement", {key: (value,) for key, value in placement(shape).items()}))
    console.print(_table("Memory of a rank", _shares(memory, in_words)))
    console.print(_table("Time of a step", _shares(seconds, lambda value: f"{1e3 * value:.2f} ms")))
    console.print(f"tokens/s, all ranks: {shape.ranks * shape.tokens / total_s:,.0f}", highlight=False)
    if total_bytes > GPUS[gpu].memory:
        console.print(
            f"does not fit: {in_words(total_bytes)} of {in_words(GPUS[gpu].memory)}: more ranks, data.batch_size or "
            "train.table_optimizer would change it",
            highlight=False,
        )
    for line in assumptions(shape, GPUS[gpu]):
        console.print(f"- {line}", highlight=False)


def placement(shape: Shape) -> dict[str, str]:
    """What lies where."""
    model, ep = shape.config.model, shape.expert_parallel_size
    found = {
        "item tables": f"{model.num_tables} × ({shape.items:,} × {model.view_dim}), "
        f"{shape.config.parallel.table_sharding} over {shape.ranks} ranks",
        "decoder": f"{shape.dense_parameters:,} weights on every rank, optimizer states split {shape.ranks} ways",
    }
    if shape.expert_blocks:
        each = model.moe.num_experts // ep
        found["experts"] = (
            f"{model.moe.num_experts} in each of {shape.expert_blocks} blocks: {each} on each of {ep} ranks, "
            f"{shape.ranks // ep} copies"
        )
    return found


def memory_parts(shape: Shape) -> dict[str, float]:
    """Bytes that the fullest rank holds, by part."""
    config, model = shape.config, shape.config.model
    d, (qk, v) = model.view_dim, shape.head_widths
    table = shape.table_elements * FLOAT
    states = table * TABLE_STATES[config.train.table_optimizer]
    if config.train.table_optimizer == "rowwise_adagrad":
        states = table / d
    dense, experts = shape.dense_parameters * FLOAT, shape.expert_parameters * FLOAT
    copies = shape.ranks // shape.expert_parallel_size
    # Kept for backward by a block: x, x̂, uvqk before and after SiLU, attention, its norm, u ⊙ norm, o and z.
    # Blocks that backward computes again keep their input alone, and one of them at a time all of this.
    recompute = config.train.recompute == "blocks"
    number = shape.activation_bytes / config.train.micro_batches
    of_block = shape.rows * (4 * d + 2 * (4 * v + 2 * qk) + 3 * 3 * v) * number
    attention = of_block + (model.num_blocks - 1) * (shape.rows * d * number if recompute else of_block)
    # By experts: the rows sent, received and returned, k for each token and view; hidden activations are recomputed.
    top_k = model.moe.top_k
    with_experts, dense_ffn = shape.expert_blocks, model.num_blocks - shape.expert_blocks
    if recompute:
        with_experts, dense_ffn = min(with_experts, 1), 0 if with_experts else 1
    ffn = shape.rows * d * number * (3 * top_k * with_experts + dense_ffn)
    logits_per_token = 1024 if config.loss.kind == "full_softmax" else config.loss.num_negatives + 1
    logits = (
        2
        * FLOAT
        * (logits_per_token * shape.items if config.loss.kind == "full_softmax" else logits_per_token * shape.tokens)
        / config.train.micro_batches
    )
    return {
        "item tables": table,
        "tables' optimizer": states,
        "decoder and its gradients": 2 * dense,
        "decoder's optimizer": DENSE_STATES * dense / shape.ranks,
        "experts and their gradients": 2 * experts,
        "experts' optimizer": DENSE_STATES * experts / copies,
        "activations: attention": attention,
        "activations: FFN, experts": ffn,
        "rows of the step's items": 4 * shape.distinct_items * model.embedding_dim * FLOAT,
        "logits": logits,
        "CUDA, NCCL": RUNTIME_BYTES,
    }


def time_parts(shape: Shape, nnodes: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of a training step, by part."""
    config, model = shape.config, shape.config.model
    d, (qk, v), n = model.view_dim, shape.head_widths, config.data.max_seq_len
    sequences, blocks, number = shape.tokens / n, model.num_blocks, shape.activation_bytes

    def compute(num_flops: float, num_bytes: float) -> float:
        return max(num_flops / shape.flops_of(gpu), num_bytes / gpu.memory_bytes_per_s) / EFFICIENCY

    def exchange(num_bytes: float, ranks: int) -> float:
        """An all-to-all in which each rank sends ``num_bytes``, evenly to ``ranks``."""
        local = min(ranks, shape.ranks_per_node)
        away = num_bytes * (ranks - local) / ranks / gpu.network_bytes_per_s
        return max(num_bytes * (local - 1) / ranks / gpu.nvlink_bytes_per_s, away) / EFFICIENCY

    def reduce(num_bytes: float, ranks: int) -> float:
        link = gpu.network_bytes_per_s if nnodes > 1 else gpu.nvlink_bytes_per_s
        return 2 * num_bytes * (ranks - 1) / ranks / link / EFFICIENCY

    row_bytes = shape.distinct_items * model.embedding_dim * FLOAT
    sharded = config.parallel.table_sharding != "data_parallel"
    pairs = n * (n + 1) / 2 * sequences * model.num_tables
    top_k = model.moe.top_k if model.moe.num_experts else 1
    hidden_rows = shape.rows * (shape.expert_blocks * top_k + blocks - shape.expert_blocks)
    scored = shape.items if config.loss.kind == "full_softmax" else config.loss.num_negatives + 1
    gathered = shape.tokens * scored if config.loss.negatives == "per_token" else shape.negative_sets * scored
    # Backward costs twice forward; what is recomputed there (hidden activations, attention scores) once more.
    return {
        "tables: rows read and updated": compute(
            0, row_bytes * (2 + 2 * (1 + TABLE_STATES[config.train.table_optimizer]))
        ),
        "tables: exchange": exchange(2 * row_bytes + shape.distinct_items * INT64, shape.ranks)
        if sharded
        else reduce(shape.table_elements * FLOAT, shape.ranks),
        "projections": compute(
            3 * 2 * shape.rows * flops.projections(model) * blocks,
            3 * shape.rows * (2 * d + 7 * v + 2 * qk) * number * blocks,
        ),
        "attention": compute(
            3.5 * 2 * pairs * flops.attention_pair(model) * blocks, 3 * shape.rows * (2 * qk + 4 * v) * number * blocks
        ),
        "FFN, experts": compute(4 * 2 * hidden_rows * flops.expert_row(model), 4 * 2 * hidden_rows * d * number),
        "experts: exchange": exchange(4 * shape.rows * top_k * d * number, shape.expert_parallel_size)
        * shape.expert_blocks,
        "loss": compute(
            3 * 2 * shape.tokens * scored * model.embedding_dim,
            3 * min(gathered, shape.tokens * scored) * model.embedding_dim * number,
        ),
        "gradients: all-reduce": reduce(shape.dense_parameters * FLOAT, shape.ranks)
        + reduce(shape.expert_parameters * FLOAT, shape.ranks // shape.expert_parallel_size),
        "host: launches": HOST_S_PER_STEP + HOST_S_PER_BLOCK * blocks,
    }


def assumptions(shape: Shape, gpu: Gpu) -> list[str]:
    """What the figures rest on, for the reader."""
    return [
        f"a cost model, not a measurement: nothing in it was fitted to a GPU; {EFFICIENCY:.0%} of the published peaks "
        f"({shape.flops_of(gpu) / 1e12:.1f} TFLOP/s {shape.config.train.precision}, {gpu.memory_bytes_per_s / 1e12:.2f} TB/s, "
        f"NVLink {gpu.nvlink_bytes_per_s / 1e9:.0f} GB/s, network {gpu.network_bytes_per_s / 1e9:.0f} GB/s a GPU)",
        f"every rank has {shape.tokens:,} tokens (sequences of full length: the worst case), experts and table shards "
        f"are evenly loaded, {shape.distinct_items:,} distinct items a step (uniform draws)",
        "parts follow one another: nothing of the network is hidden behind arithmetic",
        f"host time ({1e3 * HOST_S_PER_STEP:.0f} ms a step and {1e3 * HOST_S_PER_BLOCK:.0f} ms a block) is a guess",
    ]


def _items_of(config: Config) -> int:
    path = Path(config.data.path) / "dataset.json"
    try:
        return int(json.loads(path.read_text())["num_items"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no num_items to be read there: prepare the data set, or give --items N") from error


def _shares(parts: dict[str, float], show: Callable[[float], str]) -> dict[str, tuple[str, ...]]:
    total = sum(parts.values())
    rows = {part: (show(value), f"{value / total:.0%}") for part, value in parts.items() if value}
    return {**rows, "total": (show(total), "")}


def _table(title: str, rows: dict[str, tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    numbers = any(len(cells) > 1 for cells in rows.values())
    table.add_column()
    for _ in range(max(len(cells) for cells in rows.values())):
        table.add_column(justify="right" if numbers else "left", overflow="fold")
    for part, cells in rows.items():
        table.add_row(part, *cells)
    return table
