"""The training job.

For each global batch: look up the rows of its distinct items in the sharded tables once, pass all views through the
shared decoder, score every next item against its negatives, add what keeps the experts in balance, and step tables and
decoder. All that a step draws at random follows from (seed, step, rank), so a run that goes on from a checkpoint on as
many processes repeats the bits of one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mme.config import Config, save_config, validate_world_size
from mme.data.batch import SequenceBatch
from mme.data.sequences import PreparedDataset, TrainLoader
from mme.distributed import checkpoint
from mme.distributed.checkpoint import Progress
from mme.distributed.engine import initialize_engine, set_lr
from mme.distributed.groups import World, process_group
from mme.distributed.recommender import Recommender
from mme.evaluate import evaluate
from mme.model.loss import NextItemLoss
from mme.model.moe import Routing, load_balance_loss, router_z_loss
from mme.monitor import Monitor


def train(config: Config) -> list[dict[str, Any]]:
    """Trains, evaluates and leaves a run's folder behind; returns the final test records of the model and the baseline.

    Raises:
        UserError: configuration, data or checkpoint do not fit.
    """
    with process_group() as world:
        validate_world_size(config, world.size)
        dataset = PreparedDataset.open(Path(config.data.path))
        return Training(config, dataset, world).run()


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, over all ranks: mean loss of a token, tokens, choices of each expert by block and view."""

    loss: float
    tokens: int
    routing: list[Routing]
    counts: Tensor


class Training:
    """One run: model, optimizers, data and what has been done so far."""

    def __init__(self, config: Config, dataset: PreparedDataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.run_folder = Path(config.output_dir)
        self.recommender = Recommender(config, dataset.num_items, world)
        self.engine = initialize_engine(self.recommender.decoder, config)
        self.loss = NextItemLoss(config, dataset.num_items)
        self.loader = train_loader(dataset, config, world)
        self.total_steps = self._total_steps()
        self.select_split = "valid" if "valid" in dataset.splits(config.data.protocol) else "test"

    def run(self) -> list[dict[str, Any]]:
        config, world = self.config, self.world
        with Monitor(
            self.run_folder,
            total_steps=self.total_steps,
            rank=world.rank,
            world_size=world.size,
            log_every=config.train.log_every,
        ) as monitor:
            progress = self._start(monitor)
            for progress, batch, last_of_epoch in self._batches(progress):
                started = time.perf_counter()
                result = self.step(progress.step, batch)
                step = progress.step + 1
                self._record(monitor, step, progress.epoch, result, time.perf_counter() - started)
                self._evaluate_and_save(monitor, progress, last_of_epoch)
            return self._test(monitor)

    def step(self, step: int, batch: SequenceBatch) -> StepResult:
        """One optimizer step (the ``step``-th from 0) on this rank's part of the global batch."""
        world, config = self.world, self.config
        batch = batch.to(world.device)
        seed = (config.train.seed * 1_000_003 + step) * 1_000_003 + world.rank
        torch.manual_seed(seed)
        generator = torch.Generator(world.device).manual_seed(seed)
        lr = config.train.lr * lr_factor(config, step, self.total_steps)
        set_lr(self.engine, lr)
        self.recommender.tables.set_lr((config.train.table_lr or config.train.lr) / config.train.lr * lr)

        self.engine.train()
        items = self.loss.items_of(batch, generator)
        item_rows = self.recommender.tables.lookup(items.ids)
        output = self.engine(item_rows, items.inputs, batch.seq_offsets, batch.timestamps)
        losses = self.loss(output.hidden, item_rows, items)

        counts = torch.stack([r.counts for r in output.routing]) if output.routing else batch.seq_offsets.new_zeros(0)
        totals = world.sum(torch.cat([counts.flatten(), batch.seq_offsets[-1:]]))
        counts, tokens = totals[:-1].view(counts.shape), totals[-1]
        total = losses.sum() / tokens.clamp(min=1) + self._balance(output.routing, counts, tokens)
        self.engine.backward(total * world.size)  # DeepSpeed and TorchRec average gradients over the ranks
        self.engine.step()
        self.recommender.tables.step()
        loss = world.sum(losses.detach().double().sum()) / tokens.clamp(min=1)
        return StepResult(loss.item(), int(tokens), output.routing, counts)

    def _balance(self, routing: list[Routing], counts: Tensor, tokens: Tensor) -> Tensor:
        """This rank's share of the routers' losses, summed over the blocks."""
        moe = self.config.model.moe
        rows = tokens * self.config.model.num_tables
        total = torch.zeros((), device=self.world.device)
        for block, block_counts in zip(routing, counts, strict=True):
            total = total + moe.load_balance_coef * load_balance_loss(block, block_counts.sum(0), rows)
            if moe.z_loss_coef:
                total = total + moe.z_loss_coef * router_z_loss(block, rows)
        return total

    def _start(self, monitor: Monitor) -> Progress:
        progress = None
        if self.config.train.resume:
            progress = checkpoint.load_training(self.run_folder, self.recommender, self.engine, monitor.note)
        progress = progress or Progress(0, 0, 0)
        if self.world.rank == 0:
            save_config(self.config, self.run_folder / "config.yaml")
        monitor.resume_at(progress.step)
        monitor.run_info(
            {
                "device": torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu",
                "parameters": self.recommender.num_parameters(),
                "dataset": {key: self.dataset.info[key] for key in ("name", "num_users", "num_items", "num_events")},
            }
        )
        return progress

    def _batches(self, progress: Progress) -> Iterator[tuple[Progress, SequenceBatch, bool]]:
        """Where training stands, the batch to train on next, and whether it is the last of its epoch."""
        step, epoch, start = progress.step, progress.epoch, progress.batch
        while step < self.total_steps:
            num_batches = self.loader.num_batches(epoch)
            for index, batch in enumerate(self.loader.batches(epoch, start), start):
                if step == self.total_steps:
                    return
                yield Progress(step, epoch, index), batch, index + 1 == num_batches
                step += 1
            epoch, start = epoch + 1, 0

    def _record(self, monitor: Monitor, step: int, epoch: int, result: StepResult, step_s: float) -> None:
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"the loss at step {step} is {result.loss}")
        lr = self.engine.optimizer.param_groups[0]["lr"]
        monitor.train_step(step, epoch, loss=result.loss, tokens=result.tokens, step_s=step_s, lr=lr)
        if result.routing and (step % self.config.train.log_every == 0 or step == self.total_steps):
            shares = result.counts / result.counts.sum(-1, keepdim=True).clamp(min=1)
            monitor.experts(step, shares.tolist(), self._router_entropy(result).tolist())

    def _router_entropy(self, result: StepResult) -> Tensor:
        """(blocks, M) mean entropy in nats of the routers' probabilities over the tokens of all ranks."""
        num_views = self.config.model.num_tables
        sums = [
            torch.special.entr(routing.probabilities.detach()).sum(-1).view(num_views, -1).sum(-1)
            for routing in result.routing
        ]
        return self.world.sum(torch.stack(sums)) / max(1, result.tokens)

    def _evaluate_and_save(self, monitor: Monitor, progress: Progress, last_of_epoch: bool) -> None:
        train, step = self.config.train, progress.step + 1
        last = step == self.total_steps
        due = step % train.eval_every == 0 if train.eval_every else last_of_epoch
        following = Progress(step, progress.epoch + 1, 0) if last_of_epoch else Progress(
            step, progress.epoch, progress.batch + 1
        )
        score = None
        if due or last:
            records = evaluate(self.recommender, self.dataset, self.config, self.select_split, step)
            for record in records:
                monitor.evaluation(record)
            score = records[0]["ndcg@10"] if self.select_split == "valid" else None
        if due or last or (train.checkpoint_every and step % train.checkpoint_every == 0):
            saved = Progress(following.step, following.epoch, following.batch, score)
            checkpoint.save(self.run_folder, saved, self.recommender, train.keep_checkpoints)

    def _test(self, monitor: Monitor) -> list[dict[str, Any]]:
        """The test metrics of the checkpoint that validation chose (the last one where there is no validation)."""
        step = checkpoint.load_weights(self.run_folder, None, self.recommender)
        records = evaluate(self.recommender, self.dataset, self.config, "test", step)
        for record in records:
            monitor.evaluation(record)
        return records

    def _total_steps(self) -> int:
        """Steps until `train.steps` or `train.epochs` is reached, whichever is first."""
        train = self.config.train
        if train.epochs is None:
            assert train.steps is not None
            return train.steps
        in_epochs = sum(self.loader.num_batches(epoch) for epoch in range(train.epochs))
        return in_epochs if train.steps is None else min(train.steps, in_epochs)


def train_loader(dataset: PreparedDataset, config: Config, world: World) -> TrainLoader:
    data = config.data
    return TrainLoader(
        dataset,
        data.protocol,
        max_seq_len=data.max_seq_len,
        batch_size=data.batch_size,
        tokens_per_batch=data.tokens_per_batch,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
        global_time_test_fraction=data.global_time_test_fraction,
    )


def lr_factor(config: Config, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by at ``step`` (from 0): linear warm-up, then constant or half a cosine."""
    train = config.train
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return 1.0
    done = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
