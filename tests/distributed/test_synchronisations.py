"""A training step makes the host wait for the GPU only in known places; a new one fails here.

The calls that would wait on a GPU are counted on a CPU (`tests.synchronisations`), for this project and for the libraries that it
calls.
"""

from __future__ import annotations

import pytest

from mme.config import load_config
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World
from mme.step import TrainStep
from tests.distributed.processes import run_on
from tests.distributed.test_step import NUM_ITEMS, sequences
from tests.synchronisations import Synchronisations

Waits = dict[tuple[str, str, str], int]

# What every step waits for on a GPU: the number of distinct items of the batch, on which later sizes depend, and one read of loss,
# votes and whether everything is finite.
NEEDED: Waits = {
    ("mme/model/batch_items.py", "distinct_ids", "nonzero"): 1,
    ("mme/step.py", "backward", "tolist"): 1,
}
# TorchRec sizes its exchanges. The test's batch is made of host values.
LIBRARIES: Waits = {
    ("", "", "tensor"): 2,
    ("mme/distributed/tables.py", "lookup", "tensor"): 1,
    ("mme/distributed/tables.py", "lookup", "tolist"): 2,
}
# Only on a CPU: the PyTorch form's plan, checks of row numbers, Adam of the looked-up rows. The plan of the Triton form reads
# five numbers once per batch, in the same place as that of the PyTorch form.
ON_CPU: Waits = {
    ("kernels/relative_attention/api.py", "_check_values", "tolist"): 1,
    ("kernels/relative_attention/plan.py", "make_tile_plan", "repeat_interleave"): 1,
    ("kernels/relative_attention/plan.py", "make_tile_plan", "tensor"): 1,
    ("kernels/relative_attention/plan.py", "make_tile_plan", "tolist"): 1,
    ("kernels/sampled_softmax/api.py", "<genexpr>", "int"): 4,
    ("mme/distributed/touched_rows.py", "step", "float"): 1,
}


def waits_of_a_step(world: World, overrides: list[str]) -> Waits:
    """The waits of the second step; libraries set themselves up in the first one."""
    sizes = ["data.max_seq_len=12", "model.num_tables=2", "model.embedding_dim=16", "model.num_blocks=1"]
    config = load_config(
        None, ["data.path=unused", *sizes, "model.moe.num_experts=4", "loss.num_negatives=8", *overrides]
    )
    recommender = Recommender(config, NUM_ITEMS, world)
    step = TrainStep(config, recommender, initialize_engine(recommender.decoder, config), total_steps=2)
    step(0, sequences([0, 1, 2, 3, 4]))
    with Synchronisations() as waits:
        step(1, sequences([0, 1, 2, 3, 4]))
    return dict(waits.found)


@pytest.mark.parametrize(
    "overrides, further",
    [
        pytest.param(
            ["train.grad_clip=1.0"],
            # torch's Adam reads its count of steps, which is host memory, for dense and expert weights.
            {("mme/step.py", "update", "item"): 2},
            id="experts",
        ),
        pytest.param(
            ["model.moe.num_experts=0", "loss.negatives=shared"],
            {("mme/step.py", "update", "item"): 1},
            id="dense",
        ),
        pytest.param(
            ["model.moe.capacity_factor=1.0"],
            # The number of kept choices is a size of the experts' input.
            {
                ("mme/model/moe.py", "_within_capacity", "int"): 1,
                ("mme/step.py", "update", "item"): 2,
            },
            id="capacity",
        ),
    ],
)
def test_a_step_waits_where_it_must(overrides: list[str], further: Waits) -> None:
    (found,) = run_on(1, waits_of_a_step, overrides)
    assert found == NEEDED | LIBRARIES | ON_CPU | further
