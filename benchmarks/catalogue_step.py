"""How much longer does a training step take as the catalogue grows?

    OMP_NUM_THREADS=1 python -m benchmarks.catalogue_step --json out.json
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.catalogue_step

Whole steps (negatives, lookup, forward, loss, backward, clipping, update of decoder and tables) of FuXi-α at the public
setting (one table of 50, two blocks, N = 200), with sequences of full length over uniform items. The catalogues alternate step by
step, so that a busy machine slows all of them by the same factor; ratios are of medians. Negatives are shared by groups of 64
tokens or sampled for each token. With the latter, a step looks up nearly every item of a small catalogue and far more items of a
large one.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from benchmarks.roofline import publish, run_header
from mme.config import Config, load_config
from mme.data.batch import SequenceBatch
from mme.distributed.engine import initialize_engine
from mme.distributed.recommender import Recommender
from mme.distributed.world import World, process_group
from mme.step import TrainStep

WARM_UP_STEPS = 2
LENGTH = 200


def main(
    items: Annotated[str, typer.Option(help="Sizes of catalogues; ratios are to the first.")] = "10000,1000000",
    optimizers: Annotated[str, typer.Option(help="Values of train.table_optimizer.")] = "adam,dense_adam",
    negatives: Annotated[str, typer.Option(help="Values of loss.negatives.")] = "shared,per_token",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences per rank.")] = 128,
    grad_clip: Annotated[float, typer.Option(help="Value of train.grad_clip.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per catalogue.")] = 7,
    json_path: Annotated[Optional[Path], typer.Option("--json")] = None,  # noqa: UP045  (typer on Python 3.10)
) -> None:
    """Prints a table of milliseconds per step and, with --json, writes them."""
    rows = []
    with process_group() as world:
        for kind in negatives.split(","):
            for optimizer in optimizers.split(","):
                config = configuration(kind, optimizer, sequences, grad_clip)
                rows += measure(config, [int(number) for number in items.split(",")], steps, world)
        header = run_header(world.device, torch.float32, sequences=sequences, grad_clip=grad_clip, ranks=world.size)
        if world.rank == 0:
            columns = ("negatives", "table optimizer", "items", "looked up", "step ms", "ratio")
            cells = [
                (
                    row["negatives"],
                    row["optimizer"],
                    f"{row['items']:,}",
                    f"{row['looked_up']:,}",
                    f"{row['step_ms']:.0f}",
                    f"{row['ratio']:.2f}",
                )
                for row in rows
            ]
            publish("Training step by catalogue", header, columns, cells, rows, json_path)


def configuration(negatives: str, optimizer: str, sequences: int, grad_clip: float) -> Config:
    return load_config(
        None,
        [
            "data.path=unused",
            f"data.max_seq_len={LENGTH}",
            f"data.batch_size={sequences}",
            "model.num_tables=1",
            "model.embedding_dim=50",
            "model.ffn_multiplier=1",
            "model.moe.num_experts=0",
            f"loss.negatives={negatives}",
            f"train.table_optimizer={optimizer}",
            f"train.grad_clip={grad_clip}",
        ],
    )


def measure(config: Config, catalogues: list[int], steps: int, world: World) -> list[dict[str, Any]]:
    """Median milliseconds of a step for each catalogue, with alternating catalogues."""
    trained = []
    for num_items in catalogues:
        recommender = Recommender(config, num_items, world)
        engine = initialize_engine(recommender.decoder, config)
        trained.append(TrainStep(config, recommender, engine, WARM_UP_STEPS + steps))
    step_ms: list[list[float]] = [[] for _ in catalogues]
    looked_up = [0] * len(catalogues)
    for number in range(WARM_UP_STEPS + steps):
        for place, (step, num_items) in enumerate(zip(trained, catalogues, strict=True)):
            batch = full_batch(config.data.batch_size, num_items, number * world.size + world.rank).to(world.device)
            world.barrier()
            began = time.perf_counter()
            step.recommender.tables.set_optimizer_step(number)
            gradients = step.backward(number, batch)
            step.update(gradients)
            world.barrier()
            looked_up[place] = gradients.item_rows.shape[0]
            if number >= WARM_UP_STEPS:
                step_ms[place].append(1e3 * (time.perf_counter() - began))
    medians = [statistics.median(times) for times in step_ms]
    return [
        {
            "negatives": config.loss.negatives,
            "optimizer": config.train.table_optimizer,
            "items": num_items,
            "looked_up": ids,
            "step_ms": median,
            "fastest_ms": min(times),
            "ratio": median / medians[0],
        }
        for num_items, ids, median, times in zip(catalogues, looked_up, medians, step_ms, strict=True)
    ]


def full_batch(sequences: int, num_items: int, seed: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(num_items, (2, sequences * LENGTH), generator=generator)
    gaps = torch.randint(100_000, (sequences, LENGTH + 1), generator=generator)
    return SequenceBatch(
        item_ids=items[0],
        seq_offsets=torch.arange(sequences + 1) * LENGTH,
        timestamps=gaps.cumsum(1).flatten(),
        target_ids=items[1],
        user_rows=torch.arange(sequences),
    )


if __name__ == "__main__":
    typer.run(main)
