"""A cost model of a training step's time, part by part; docs/multi-node.md describes it.

A part takes as long as the slowest of its arithmetic, memory traffic and network at the rates of `mme.devices`, and
names that bound. Parts do not overlap.

Legend: as in `launcher.shape`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from launcher.memory import INT64, has_dense_gradient
from launcher.shape import Shape
from mme import flops
from mme.devices import Device
from mme.table_placement import FLOAT, STATES

Bound = Literal["arithmetic", "memory", "bandwidth", "latency", "host"]


@dataclass(frozen=True)
class PartTime:
    """Seconds of a part of the step, and what bounds them."""

    seconds: float
    bound: Bound


def time_parts(shape: Shape, device: Device) -> dict[str, PartTime]:
    """The time of the slowest rank in a step on ``device``, by part. Parts that take no time are left out."""
    config, model = shape.config, shape.config.model
    work, links = _Work(shape, device), _Links(shape, device)
    d, v, qk, blocks, number = model.view_dim, shape.v_width, shape.qk_width, model.num_blocks, shape.number_bytes
    again = config.train.recompute == "blocks"  # forward a second time
    n = config.data.max_seq_len
    pairs = n * (n + 1) / 2 * shape.tokens / n * model.num_tables
    hidden_rows = shape.rows * (shape.expert_blocks * shape.top_k + blocks - shape.expert_blocks)
    row_bytes = shape.looked_up * FLOAT * shape.table_skew
    loss = config.loss
    gathered = shape.items if loss.is_full_softmax else shape.negative_sets * shape.scored
    parts = {
        "tables: rows read and updated": _table_update(shape, work, row_bytes),
        "tables: exchange": _table_exchange(shape, links, row_bytes),
        # Backward costs twice forward, plus what it recomputes: scores, and two of an expert's three products.
        "projections": work.of(
            (3 + again) * 2 * shape.rows * flops.projections(model) * blocks,
            (3 + again) * shape.rows * (2 * d + 7 * v + 2 * qk) * number * blocks,
        ),
        "attention": work.of(
            2 * pairs * ((3 + again) * flops.attention_pair(model) + qk) * blocks,
            (3 + again) * shape.rows * (2 * qk + 4 * v) * number * blocks,
        ),
        "FFN, experts": work.of(
            (3 + 2 / 3 + again) * 2 * hidden_rows * flops.expert_row(model), 8 * hidden_rows * d * number
        ),
        "experts: exchange": _expert_exchange(shape, links, again),
        "loss": work.of(
            loss.num_passes * (3 + loss.is_full_softmax) * 2 * shape.tokens * shape.scored * model.embedding_dim,
            loss.num_passes * 3 * gathered * model.embedding_dim * number,
        ),
        "gradients: all-reduce": links.reduce(shape.dense_parameters * FLOAT, shape.ranks, times=3),
        "experts' gradients: all-reduce": links.reduce(shape.expert_parameters * FLOAT, shape.expert_copies),
        "optimizer of the decoder": work.of(
            0, 8 * FLOAT * (shape.dense_parameters / shape.ranks + shape.expert_parameters / shape.expert_copies)
        ),
        "host": PartTime(device.host_step_s + device.host_block_s * blocks, "host"),
    }
    return {name: part for name, part in parts.items() if part.seconds}


def total_s(parts: dict[str, PartTime]) -> float:
    return sum(part.seconds for part in parts.values())


def _table_update(shape: Shape, work: _Work, row_bytes: float) -> PartTime:
    """Reads rows, writes their gradients, and updates weights and states of these rows, or of all rows.

    Rows and states in host memory cross the GPU's link. A cache holds no states, and of uniformly drawn rows only its share.
    """
    states_per_weight = STATES[shape.config.train.table_optimizer]
    if has_dense_gradient(shape):
        return work.of(0, 2 * row_bytes + shape.table_elements * FLOAT * (2 + 2 * (1 + states_per_weight)))
    weights, states = 2 * row_bytes, 2 * row_bytes * states_per_weight
    on_device = work.of(0, 2 * row_bytes + weights + states)
    placement = shape.table_placement(work.device)
    if placement == "device":
        return on_device
    missed = 1.0 if placement == "uvm" else 1 - shape.config.parallel.table_cache_load_factor
    over_link = (missed * (row_bytes + weights) + states) / work.device.host_link_bytes_per_s / work.device.efficiency
    return PartTime(max(over_link, on_device.seconds), "bandwidth")


def _table_exchange(shape: Shape, links: _Links, row_bytes: float) -> PartTime:
    """Sharded tables exchange lengths, ids, rows and gradients; replicated ones all-reduce the gradient of every row."""
    if not shape.is_sharded:
        return links.reduce(shape.table_elements * FLOAT, shape.ranks)
    sent = row_bytes if shape.config.parallel.exchange_dtype == "float32" else row_bytes / 2
    exchanges: list[float] = [INT64, shape.ids_sent * INT64, sent, sent]
    if shape.config.train.grad_clip:
        exchanges += [INT64, shape.distinct_items * INT64, shape.looked_up * FLOAT]
    return links.exchange(exchanges, shape.ranks)


def _expert_exchange(shape: Shape, links: _Links, again: bool) -> PartTime:
    """Exchanges counts, rows to the experts and back, and the gradients of both, in each block with experts."""
    rows = float(shape.rows * shape.top_k * shape.config.model.view_dim * shape.number_bytes)
    of_block = [INT64, rows, rows, rows, rows, *([INT64, rows, rows] if again else [])]
    return links.exchange(of_block * shape.expert_blocks, shape.expert_parallel_size)


@dataclass(frozen=True)
class _Work:
    shape: Shape
    device: Device

    def of(self, num_flops: float, num_bytes: float) -> PartTime:
        device = self.device
        peak = device.bfloat16_flops if self.shape.number_bytes == 2 else device.float32_flops
        arithmetic, memory = num_flops / peak, num_bytes / device.memory_bytes_per_s
        return PartTime(max(arithmetic, memory) / device.efficiency, "arithmetic" if arithmetic > memory else "memory")


@dataclass(frozen=True)
class _Links:
    shape: Shape
    device: Device

    def exchange(self, sizes: list[float], ranks: int) -> PartTime:
        """Consecutive all-to-alls; ``sizes`` are the bytes that a rank sends in each, evenly to ``ranks``."""
        if ranks == 1:
            return PartTime(0.0, "latency")
        device, local = self.device, min(ranks, self.shape.ranks_per_node)
        near = (local - 1) / ranks / device.local_bytes_per_s
        far = (ranks - local) / ranks / device.network_bytes_per_s
        moving = sum(sizes) * max(near, far) / device.efficiency
        latency = device.network_latency_s if ranks > local else device.local_latency_s
        return _slower(moving, len(sizes) * (latency + (ranks - 1) * device.message_s))

    def reduce(self, num_bytes: float, ranks: int, times: int = 1) -> PartTime:
        """``times`` all-reduces of ``num_bytes`` together: a ring's bandwidth and a tree's latency."""
        if ranks == 1:
            return PartTime(0.0, "latency")
        device = self.device
        # Ranks that hold the same experts lie a whole expert-parallel group apart, mostly on other nodes.
        away = self.shape.nodes > 1
        rate = device.network_bytes_per_s if away else device.local_bytes_per_s
        latency = device.network_latency_s if away else device.local_latency_s
        moving = 2 * num_bytes * (ranks - 1) / ranks / rate / device.efficiency
        return _slower(moving, times * 2 * math.ceil(math.log2(ranks)) * latency)


def _slower(moving: float, waiting: float) -> PartTime:
    return PartTime(moving + waiting, "bandwidth" if moving > waiting else "latency")
