"""The training job: batches in, checkpoints and metrics out; one step is `mme.step`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mme.config import Config, save_config, validate_world_size
from mme.data.batch import SequenceBatch
from mme.data.sequences import PreparedDataset, TrainLoader
from mme.distributed import checkpoint
from mme.distributed.checkpoint import Progress
from mme.distributed.engine import initialize_engine
from mme.distributed.groups import World, process_group
from mme.distributed.recommender import Recommender
from mme.evaluate import evaluate
from mme.monitor import Monitor
from mme.non_finite import FOLDER, MOST_IN_A_ROW, NonFiniteError, save_batch
from mme.step import StepResult, TrainStep


def train(config: Config) -> list[dict[str, Any]]:
    """Trains, evaluates and leaves a run's folder behind; returns the final test records of the model and the baseline.

    Raises:
        UserError: configuration, data or checkpoint do not fit.
    """
    with process_group() as world:
        validate_world_size(config, world.size)
        dataset = PreparedDataset.open(Path(config.data.path))
        return Training(config, dataset, world).run()


class Training:
    """One run: model, optimizers, data and what has been done so far."""

    def __init__(self, config: Config, dataset: PreparedDataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.run_folder = Path(config.output_dir)
        self.recommender = Recommender(config, dataset.num_items, world)
        self.engine = initialize_engine(self.recommender.decoder, config)
        self.loader = train_loader(dataset, config, world)
        self.total_steps = self._total_steps()
        self.step = TrainStep(config, self.recommender, self.engine, self.total_steps)
        self.skipped = self.skipped_in_a_row = 0
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
            self.skipped = progress.skipped
            for at, batch, last_of_epoch in self._batches(progress):
                started = time.perf_counter()
                result = self.step(at.step, batch, self.skipped)
                if result.skipped:
                    self._on_non_finite(monitor, at.step + 1, batch, result)
                else:
                    self.skipped_in_a_row = 0
                self._record(monitor, at.step + 1, at.epoch, result, time.perf_counter() - started)
                self._evaluate_and_save(monitor, at, last_of_epoch)
            return self._test(monitor)

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
        extra = {"skipped_steps": self.skipped}
        monitor.train_step(
            step, epoch, loss=result.loss, tokens=result.tokens, step_s=step_s, lr=result.lr, extra=extra
        )
        if (
            result.routing
            and not result.skipped
            and (step % self.config.train.log_every == 0 or step == self.total_steps)
        ):
            shares = result.counts / result.counts.sum(-1, keepdim=True).clamp(min=1)
            blocks = sorted(set(self.config.model.moe.placement)) or None
            monitor.experts(step, shares.tolist(), self._router_entropy(result).tolist(), blocks, self._dropped(result))

    def _dropped(self, result: StepResult) -> list[list[float]] | None:
        """[block][view] share of the choices of all ranks that found their expert full; None where nothing is dropped."""
        dropped = [routing.dropped.sum(-1) for routing in result.routing if routing.dropped is not None]
        if not dropped:
            return None
        return (self.world.sum(torch.stack(dropped)) / result.counts.sum(-1).clamp(min=1)).tolist()

    def _on_non_finite(self, monitor: Monitor, step: int, batch: SequenceBatch, result: StepResult) -> None:
        """Keeps the batch of a step that was skipped; stops the job, unless the configuration says to go on."""
        save_batch(self.run_folder, step, self.world.rank, batch)
        self.world.barrier()  # all ranks' parts are there before the job ends
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = "a gradient" if math.isfinite(result.loss) else "the loss"
        found = f"{what} at step {step} is not finite; its batch is in {self.run_folder / FOLDER}/step_{step}_rank_*.parquet"
        if self.config.train.on_non_finite == "stop":
            raise NonFiniteError(f"{found} (train.on_non_finite=skip would leave it out)")
        if self.skipped_in_a_row == MOST_IN_A_ROW:
            raise NonFiniteError(f"{found}; {MOST_IN_A_ROW} steps in a row were skipped")
        monitor.note(f"warning: {found}; the step is skipped")

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
        following = (
            Progress(step, progress.epoch + 1, 0)
            if last_of_epoch
            else Progress(step, progress.epoch, progress.batch + 1)
        )
        score = None
        if due or last:
            records = evaluate(self.recommender, self.dataset, self.config, self.select_split, step)
            for record in records:
                monitor.evaluation(record)
            score = records[0]["ndcg@10"] if self.select_split == "valid" else None
        if due or last or (train.checkpoint_every and step % train.checkpoint_every == 0):
            saved = replace(following, skipped=self.skipped, score=score)
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
