"""The collectives of a training step on several processes, by kind and bytes, and where the host waits for values; docs/multi-node.md
lists them.

A step of two views and two blocks with experts, which are spread over all processes.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from mme.config import load_config
from mme.distributed import engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.step import TrainStep
from tests.collectives import Collectives
from tests.distributed.processes import run_on
from tests.distributed.test_step import LENGTHS, NUM_ITEMS, sequences
from tests.distributed.test_synchronisations import LIBRARIES, NEEDED, ON_CPU, Waits
from tests.synchronisations import Synchronisations

NUM_VIEWS, WIDTH, NUM_BLOCKS, NUM_EXPERTS, TOP_K = 2, 8, 2, 4, 2
INTEGER, FLOAT, DOUBLE = 8, 4, 8  # bytes

BATCH = {("", "", "tensor"): 2}  # of the test's batch, which is made before here

Exchanges = dict[tuple[str, str, str], tuple[int, int]]  # file, function, kind → how often, bytes


def step_of(world: World, split: list[list[int]], overrides: list[str]) -> tuple[Exchanges, Waits, int, int]:
    """Collectives and waits of the second step, the rows that this process looked up, and its dense weights."""
    sizes = [
        f"model.num_tables={NUM_VIEWS}",
        f"model.embedding_dim={NUM_VIEWS * WIDTH}",
        f"model.num_blocks={NUM_BLOCKS}",
    ]
    experts = [f"model.moe.num_experts={NUM_EXPERTS}", f"model.moe.top_k={TOP_K}", "loss.num_negatives=8"]
    config = load_config(None, ["data.path=unused", "data.max_seq_len=12", *sizes, *experts, *overrides])
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, engine.initialize_engine(recommender.decoder, config), total_steps=2)
    batch = sequences(split[world.rank])
    step(0, batch)  # in which libraries set themselves up
    with Collectives() as collectives, Synchronisations() as waits:
        step(1, batch)
    found: dict[tuple[str, str, str], list[int]] = collections.defaultdict(list)
    for *place, num_bytes in collectives.found:
        found[tuple(place)].append(num_bytes)  # type: ignore[index]
    rows = step.sample_items([batch], 0, None)[0].ids.numel() if config.loss.kind == "full_softmax" else 0
    dense = sum(p.numel() for name, p in recommender.decoder.named_parameters() if ".experts." not in name)
    return {place: (len(each), sum(each)) for place, each in found.items()}, dict(waits.found), rows, dense


def over_ranks(results: list[tuple[Exchanges, Waits, int, int]]) -> Exchanges:
    """How often each process takes part in an exchange, and the bytes that all of them contribute."""
    total = {}
    for place in results[0][0]:
        counts, sizes = zip(*(result[0][place] for result in results), strict=True)
        assert len(set(counts)) == 1
        total[place] = (counts[0], sum(sizes))
    return total


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize(
    "split",
    [[[0, 1], [2, 3, 4]], pytest.param([[0], [1, 2], [], [3, 4]], marks=pytest.mark.slow)],
    ids=["two", "four"],
)
def test_a_step_exchanges_what_it_must(split: list[list[int]], limit: float) -> None:
    size = len(split)
    # With the full softmax every process looks up all items.
    results = run_on(size, step_of, split, ["loss.kind=full_softmax", f"train.grad_clip={limit}"])
    rows, dense = sum(result[2] for result in results), results[0][3]
    assert rows == size * NUM_ITEMS
    row_bytes = rows * NUM_VIEWS * WIDTH * FLOAT
    padded = -(-dense // (2 * size)) * 2 * size  # ZeRO's parts are equal, of an even number of weights
    choices = sum(LENGTHS) * NUM_VIEWS * TOP_K * WIDTH * FLOAT
    expert = (
        3
        * WIDTH
        * load_config(
            None, ["data.path=unused", f"model.embedding_dim={NUM_VIEWS * WIDTH}", f"model.num_tables={NUM_VIEWS}"]
        ).model.hidden_dim
    )
    tables, decoder = ("mme/distributed/tables.py", "lookup"), ("mme/step.py", "_part")
    expected = {
        # Sizes of the exchange (3 numbers for each other process), lengths and ids, once for both tables, and the rows.
        (*tables, "all-to-all"): (
            4,
            size * size * 3 * INTEGER + size * size * INTEGER + rows * INTEGER + row_bytes,
        ),
        # In each block with experts: counts and rows, the results, and in backward the gradients of both.
        ("mme/distributed/experts.py", "dispatch", "all-to-all"): (
            2 * NUM_BLOCKS,
            NUM_BLOCKS * (size * NUM_EXPERTS * INTEGER + choices),
        ),
        ("mme/distributed/experts.py", "combine", "all-to-all"): (NUM_BLOCKS, NUM_BLOCKS * choices),
        (*decoder, "all-to-all"): (2 * NUM_BLOCKS, 2 * NUM_BLOCKS * choices),
        # The experts' choices, and four numbers of tokens.
        ("mme/distributed/world.py", "start_sum", "all-reduce"): (
            1,
            size * (NUM_BLOCKS * NUM_VIEWS * NUM_EXPERTS + 4) * INTEGER,
        ),
        # DeepSpeed's gradients; no other process has the same experts, but DeepSpeed reduces theirs too.
        (*decoder, "all-reduce"): (2, size * dense * FLOAT + NUM_BLOCKS * NUM_EXPERTS * expert * FLOAT),
        # Loss, whether all is finite, and the sum of squares.
        ("mme/distributed/world.py", "sum", "all-reduce"): (1, size * 3 * DOUBLE),
        # The weights after DeepSpeed's update, and the gradients of the rows; a limit needs these before the update.
        ("mme/step.py", "update", "all-gather"): (1, padded * FLOAT),
        ("mme/step.py", "_squared_norm" if limit else "update", "all-to-all"): (1, row_bytes),
    }
    assert over_ranks(results) == expected
    assert sum(count for count, _ in expected.values()) == 20


def test_a_step_on_two_processes_waits_where_it_must() -> None:
    split = [[0, 1], [2, 3, 4]]
    for _, waits, _, _ in run_on(2, step_of, split, ["train.grad_clip=1.0"]):
        assert waits | BATCH == NEEDED | LIBRARIES | ON_CPU | {
            # TorchRec sizes the exchange of ids.
            ("mme/distributed/tables.py", "lookup", "tensor"): 4,
            ("mme/distributed/tables.py", "lookup", "tolist"): 5,
            # DeepSpeed sizes the experts' exchange; the list is of host memory.
            ("mme/distributed/experts.py", "dispatch", "cpu"): NUM_BLOCKS,
            ("mme/distributed/experts.py", "dispatch", "tolist"): NUM_BLOCKS,
            # Adam of tables on a CPU: two processes may have looked up the same row.
            ("mme/distributed/touched_rows.py", "take_gradient", "unique"): 1,
            ("mme/step.py", "update", "item"): 2,
        }


def reductions(world: World, split: list[list[int]], elements: int) -> tuple[list[int], Any]:
    """Bytes of each reduction of dense gradients in backward, and the gradients, with buckets of so many ``elements``."""
    engine.BUCKET_ELEMENTS = elements
    config = load_config(
        None,
        [
            "data.path=unused",
            "data.max_seq_len=12",
            "model.num_tables=1",
            "model.embedding_dim=16",
            "loss.num_negatives=8",
            "model.moe.num_experts=0",
        ],
    )
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, engine.initialize_engine(recommender.decoder, config), total_steps=2)
    with Collectives() as collectives:
        step.backward(0, sequences(split[world.rank]))
    reduced = [found[-1] for found in collectives.found if found[:3] == ("mme/step.py", "_part", "all-reduce")]
    return reduced, [gradient.clone() for gradient in engine.reduced_gradients(step.engine)]


def test_gradients_are_reduced_in_buckets_during_backward() -> None:
    split = [[0, 3], [1, 2, 4]]
    at_once, in_buckets = (run_on(2, reductions, split, elements) for elements in (2**23, 512))
    for (whole, gradients), (buckets, same) in zip(at_once, in_buckets, strict=True):
        assert len(whole) == 1 and len(buckets) > 4
        assert sum(buckets) == sum(whole)
        assert all(torch.equal(*pair) for pair in zip(gradients, same, strict=True))
