"""The training job: reads batches, runs steps (`mme.step`), writes checkpoints and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from mme.config import (
    CONFIG_FILE,
    Config,
    changed_settings,
    flat,
    save_config,
    settings_sha256,
    validate_world_size,
    warnings,
)
from mme.data.balance import attention_equals_rest_at
from mme.data.batch import SequenceBatch
from mme.data.dataset import PreparedDataset
from mme.data.features import Features
from mme.data.loaders import TrainLoader
from mme.data.split import HeldOut, Split
from mme.data.target_weights import read_target_weights
from mme.distributed import checkpoint
from mme.distributed.checkpoint_index import Progress
from mme.distributed.checkpoint_writer import CheckpointWriter
from mme.distributed.engine import initialize_engine
from mme.distributed.pace import Pace, known_peak
from mme.distributed.recommender import Recommender
from mme.distributed.world import PATIENCE_S, World, process_group
from mme.errors import FinalError, NonFiniteError, Preempted, UserError
from mme.evaluation.evaluate import evaluate
from mme.evaluation.record import SELECTED_BY, repeats_warning
from mme.growth.join import EarlierRun
from mme.growth.known import require_numbering
from mme.growth.start import resume, start_from
from mme.model.kernel_variants import compile_training_kernels
from mme.profiling.profile import profiled
from mme.profiling.regions import each_in_region, region
from mme.run import attempts
from mme.run.monitor import Monitor
from mme.run.non_finite import MOST_IN_A_ROW, MOST_KEPT, NON_FINITE_FOLDER, save_batch
from mme.run.preemption import Preemption
from mme.run.run_lock import only_job
from mme.run.same_job import require_same_job, require_shared_folder
from mme.run.trackers import require_packages
from mme.run.watchdog import Watchdog, record_collectives
from mme.step import StepResult, TrainStep
from mme.table_placement import in_lines

Batch = tuple[Progress, SequenceBatch, Progress]  # progress before the batch, the batch, progress after it


def train(config: Config) -> list[dict[str, Any]]:
    """Trains and evaluates a model and writes a run's folder. Returns the test records of the model and the baseline.

    Raises:
        UserError: configuration, data or checkpoint do not match, or a tracker cannot be used.
    """
    require_packages(config.train.trackers)
    # The watchdog must notice a hang before a collective times out.
    patience_s = max(PATIENCE_S, config.train.hang_timeout_s + 120)
    record_collectives()
    with Preemption(Path(config.output_dir)) as preemption, process_group(patience_s) as world:
        validate_world_size(config, world.size)
        dataset = PreparedDataset.open(config.data.path, config.data.cache_dir)
        require_same_job(config, dataset.sha256, world)
        with only_job(Path(config.output_dir), world):
            require_shared_folder(Path(config.output_dir), world)
            return Training(config, dataset, world, preemption).run()


class Training:
    """One run: model, optimizers, data and progress."""

    def __init__(self, config: Config, dataset: PreparedDataset, world: World, preemption: Preemption) -> None:
        self.config, self.dataset, self.world, self.preemption = config, dataset, world, preemption
        self.run_folder, self.split = Path(config.output_dir), Split.of(config.data)
        self.watchdog = Watchdog(self.run_folder, world, config.train.hang_timeout_s)
        features = config.model.feature_columns
        sizes = dataset.feature_sizes(features)
        # The tables are initialised in `_start`, unless a checkpoint fills them.
        self.recommender = Recommender(config, dataset.num_items, world, sizes, initialise_tables=False)
        self.engine = initialize_engine(self.recommender.decoder, config)
        self.numbering: str = world.of_first(dataset.numbering_sha256(features) if world.rank == 0 else "")
        self.loader = TrainLoader(
            dataset,
            config.data,
            world,
            Features.of(config.model),
            seed=config.train.seed,
            attention_equals_rest_at=attention_equals_rest_at(config.model),
            target_weights=read_target_weights(dataset.folder, dataset.info, config.loss),
        )
        self.total_steps = self._total_steps(Progress(0, 0, 0))
        needed = config.train.profile_start + config.train.profile
        if config.train.profile and needed > self.total_steps:
            raise UserError(
                f"train.profile_start ({config.train.profile_start}) + train.profile ({config.train.profile}) must not "
                f"exceed the steps of the run ({self.total_steps})"
            )
        counts = dataset.training_counts(self.split) if config.loss.needs_training_counts else None
        self.step = TrainStep(config, self.recommender, self.engine, self.total_steps, counts)
        self.pace = Pace(world, config, dataset.num_items, known_peak(config, world.device))
        self.skipped = self.skipped_in_a_row = self.steps_before = self.resumed_from = self.reached = 0  # steps
        self.without_gain = 0  # evaluations
        self.best_score: float | None = None
        self.job = settings_sha256(flat(config))
        self._look_up_targets()

    def _look_up_targets(self) -> None:
        """Checks that each held-out part has targets, and hashes them now, in case the data set is replaced meanwhile."""
        for part in self.split.held_out:
            rows, _ = self.dataset.targets(self.split, part)
            if not rows.size:
                raise UserError(
                    f"{self.config.data.path}: no user has an event for the {part} split of "
                    f"data.protocol={self.split.protocol}"
                )
            self.dataset.targets_sha256(self.split, part)  # kept by the data set

    def run(self) -> list[dict[str, Any]]:
        config, world = self.config, self.world
        monitor = Monitor(
            self.run_folder,
            total_steps=self.total_steps,
            rank=world.rank,
            world_size=world.size,
            log_every=config.train.log_every,
            trackers=config.train.trackers,
            settings=flat(config),
        )
        keep, incremental = config.train.keep_checkpoints, config.train.checkpoint_incremental
        self.writer = writer = CheckpointWriter(self.run_folder, self.recommender, keep, incremental)
        with monitor, self.watchdog, self._counted_attempt(), writer, self.pace:
            progress = self._start(monitor)
            self._compile_kernels(monitor)
            if progress.evaluate:
                self._evaluate_and_save(monitor, progress)
            self.pace.begin_step()
            batches, left = self._batches(progress), self.total_steps - progress.step
            for at, batch, after in profiled(batches, config.train, left, self.run_folder, world, monitor.note):
                self.reached = at.step + 1
                self.watchdog.beat(f"training step {self.reached}")
                self.pace.count(batch)
                applied = self.steps_before + at.step - self.skipped
                result = self.step(at.step, batch, applied, [self.preemption.requested, *writer.votes()])
                if result.skipped:
                    self._on_non_finite(monitor, at.step + 1, batch, result)
                else:
                    self.skipped_in_a_row = 0
                self._record(monitor, at.step + 1, at.epoch, result)
                stop, *votes = result.votes
                writer.after_step(*votes)  # votes on the previous checkpoint; the next one is not started yet
                self._save_where_due(monitor, self._following(after), stop)
                if self._is_out_of_patience():
                    break
                self.watchdog.beat(f"waiting for the batch of step {at.step + 2}")
                self.pace.begin_step()
            writer.wait()
            return self._test(monitor)

    @contextmanager
    def _counted_attempt(self) -> Iterator[None]:
        """Counts attempts that end with a NaN or infinity in the run's folder (`mme.run.attempts`)."""
        try:
            yield
        except NonFiniteError as error:
            if self.world.rank == 0:
                failed_at = self.reached if error.step is None else error.step
                attempts.record_failure(self.run_folder, self.job, self.resumed_from, failed_at)
            raise
        if self.world.rank == 0:
            attempts.forget(self.run_folder)

    def _compile_kernels(self, monitor: Monitor) -> None:
        """Compiles all kernels at once, because the first step would compile them one after another."""
        self.watchdog.beat("compiling kernels")
        if note := compile_training_kernels(self.config, self.world.device, self.world.size):
            monitor.note(note)
        self.world.barrier()  # the other ranks of a node load what its first one has compiled

    def _start(self, monitor: Monitor) -> Progress:
        found = None
        if self.config.train.resume:
            self._go_back(monitor)
            found = resume(self.run_folder, self.dataset, self.recommender, self.engine, monitor.note)
        progress, has_grown = found or (self._first_progress(monitor), False)
        if has_grown:  # scores before and after are of other targets
            progress = replace(progress, best_score=None, without_gain=0)
        self.skipped, self.skipped_in_a_row = progress.skipped, progress.skipped_in_a_row
        self.steps_before = progress.steps_before
        self.best_score, self.without_gain = progress.best_score, progress.without_gain
        if found is not None:
            self._resume(progress, has_grown, monitor)
        elif not self.config.train.resume:
            self._start_over(monitor)
        self.resumed_from = self.reached = progress.step
        if self.world.rank == 0:
            save_config(self.config, self.run_folder / CONFIG_FILE)
        monitor.resume_at(progress.step, self.total_steps)
        info = {
            "device": torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu",
            "parameters": self.recommender.num_parameters(),
            "tables": [asdict(placement) for placement in self.recommender.tables.placements],
            "dataset": {key: self.dataset.info[key] for key in ("name", "num_users", "num_items", "num_events")},
        }
        self.world.on_first(lambda: monitor.run_info(info))  # a tracker may be unusable
        found_wrong = [f"warning: {warning}" for warning in warnings(self.config)]
        for line in [*in_lines(self.recommender.tables.placements), *found_wrong]:
            monitor.note(line)
        return progress

    def _first_progress(self, monitor: Monitor) -> Progress:
        """Initialises the tables, or all weights and states from another run."""
        if (init_from := self.config.train.init_from) is None:
            self.recommender.tables.initialise()
            return Progress(0, 0, 0)
        earlier = EarlierRun.open(Path(init_from), self.config)
        return start_from(earlier, self.dataset, self.recommender, self.engine, monitor.note)

    def _go_back(self, monitor: Monitor) -> None:
        """Sets checkpoints aside that lead to the same failure again (`mme.run.attempts`)."""
        found = self.world.of_first(attempts.go_back(self.run_folder, self.job) if self.world.rank == 0 else None)
        if isinstance(found, FinalError):
            raise found
        if found is not None:
            monitor.note(found)

    def _start_over(self, monitor: Monitor) -> None:
        """Removes old checkpoints, which could otherwise be newer or better than those of this run."""
        if self.world.rank == 0:
            attempts.forget(self.run_folder)
        if self.world.rank == 0 and (removed := checkpoint.remove_all(self.run_folder)):
            monitor.note(f"train.resume=false: {removed} checkpoints of the previous run are removed")
        self.world.barrier()

    def _resume(self, progress: Progress, has_grown: bool, monitor: Monitor) -> None:
        if not has_grown:
            self.writer.resumed_at(progress.step)
        self._keep_global_batches(progress, monitor)
        if self._is_out_of_patience():
            self.total_steps = progress.step
        if self.world.rank == 0 and (changed := changed_settings(self.run_folder, self.config)):
            monitor.note(f"resumes with {', '.join(changed)}")
        if progress.step < self.total_steps or progress.evaluate:
            return
        if has_grown:
            train = self.config.train
            given = {"train.epochs": train.epochs, "train.steps": train.steps}
            limits = " and ".join(f"{key}={value}" for key, value in given.items() if value is not None)
            raise UserError(
                f"{self.config.data.path} has grown since step {progress.step} of {self.run_folder}, and no step is left to train "
                f"on it: expected more than {limits}"
            )
        monitor.note(f"training is complete: the checkpoint of step {progress.step} is tested again")

    def _keep_global_batches(self, progress: Progress, monitor: Monitor) -> None:
        """Keeps the size of global batches unless the configuration asks for another one now."""
        if progress.rank_batch == self.config.data.rank_batch:
            self.loader.set_shares(progress.shares)
        if self.loader.shares != self.world.size:
            monitor.note(
                f"the global batch remains {progress.shares} × {progress.rank_batch}, now divided among {self.world.size} "
                "processes (another data.batch_size or data.tokens_per_batch would change it)"
            )
        self.total_steps = self.step.total_steps = self._total_steps(progress)

    def _batches(self, progress: Progress) -> Iterator[Batch]:
        """Yields each batch with the progress before and after it."""
        with closing(self.loader.stream(progress.epoch, progress.sequences)) as stream:
            for step, batch in zip(
                range(progress.step, self.total_steps), each_in_region("data", stream), strict=False
            ):
                epoch, sequences = (batch.epoch + 1, 0) if batch.is_last else (batch.epoch, batch.end)
                after = Progress(step + 1, epoch, sequences)
                yield progress, batch.sequences, after
                progress = after

    def _record(self, monitor: Monitor, step: int, epoch: int, result: StepResult) -> None:
        step_s, is_line_due = self.pace.end_step(), monitor.is_line_due(step)
        extra = {"skipped_steps": self.skipped, **(self.pace.over_ranks() if is_line_due else {})}
        monitor.train_step(
            step, epoch, loss=result.loss, tokens=result.tokens, step_s=step_s, lr=result.lr, extra=extra
        )
        if result.routing and not result.skipped and is_line_due:
            monitor.experts(step, **result.expert_load(self.config.model.moe, self.world))

    def _on_non_finite(self, monitor: Monitor, step: int, batch: SequenceBatch, result: StepResult) -> None:
        """Saves the batch of a skipped step; stops the job unless `train.on_non_finite` is skip."""
        if self.skipped < MOST_KEPT:
            save_batch(self.run_folder, step, self.world.rank, batch)
        self.world.barrier()  # every rank has saved its part before the job ends
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = "a gradient" if math.isfinite(result.loss) else "the loss"
        found = f"{what} at step {step} is not finite; its batch is in {self.run_folder / NON_FINITE_FOLDER}/step_{step}_rank_*.parquet"
        if self.config.train.on_non_finite == "stop":
            raise NonFiniteError(f"{found} (train.on_non_finite=skip would skip the step)")
        if self.skipped_in_a_row == MOST_IN_A_ROW:
            raise NonFiniteError(f"{found}; {MOST_IN_A_ROW} steps in a row were skipped")
        monitor.warn(f"{found}; the step is skipped")

    def _following(self, after: Progress) -> Progress:
        """``after``, completed with what the next steps and a checkpoint need, such as whether an evaluation is due."""
        ends_epoch, every = after.sequences == 0, self.config.train.eval_every
        due = after.step % every == 0 if every else ends_epoch
        return replace(
            after,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            evaluate=due or after.step == self.total_steps,
            shares=self.loader.shares,
            rank_batch=self.config.data.rank_batch,
            dataset=self.dataset.sha256,
            numbering=self.numbering,
            rows={name: len(block) for name, block in self.recommender.rows.blocks.items()},
            num_runs=self.dataset.num_runs,
            runs=self.dataset.runs_sha256(self.dataset.num_runs),
            steps_before=self.steps_before,
            best_score=self.best_score,
            without_gain=self.without_gain,
        )

    def _is_out_of_patience(self) -> bool:
        return 0 < self.config.train.patience <= self.without_gain

    @region("checkpoint")
    def _save_where_due(self, monitor: Monitor, progress: Progress, stop: bool) -> None:
        every = self.config.train.checkpoint_every
        if stop:
            self._save_and_stop(progress)
        elif progress.evaluate:
            self._evaluate_and_save(monitor, progress)
        elif every and progress.step % every == 0:
            self.writer.save(progress)

    def _save_and_stop(self, progress: Progress) -> NoReturn:
        self.watchdog.beat("saving before it stops")
        self.writer.save(progress)
        self.writer.wait()
        raise Preempted(f"asked to stop: saved at step {progress.step}; the same command resumes from there")

    def _evaluate_and_save(self, monitor: Monitor, progress: Progress) -> None:
        try:
            records = self._evaluate(self.split.selection, progress.step)
        except Preempted:
            self._save_and_stop(progress)
        self._show(monitor, records)
        progress = progress.evaluated(records[0][SELECTED_BY] if self.split.selection == "valid" else None)
        self.best_score, self.without_gain = progress.best_score, progress.without_gain
        self.writer.save(progress)
        if self._is_out_of_patience():
            monitor.note(f"no higher NDCG@10 in {self.without_gain} evaluations: stops at step {progress.step}")
            self.total_steps = progress.step

    def _test(self, monitor: Monitor) -> list[dict[str, Any]]:
        """The test metrics of the checkpoint with the best validation metrics (without validation, of the last one)."""
        index = checkpoint.best_sound(self.run_folder, None, self.world, monitor.note)
        at = checkpoint.folder(self.run_folder, index.progress.step)
        require_numbering(index.progress, at, self.numbering, self.config.data.path)
        checkpoint.load_weights(self.run_folder, index, self.recommender)
        records = self._evaluate("test", index.progress.step, keep_ranks_in=self.run_folder)
        self._show(monitor, records)
        return records

    def _show(self, monitor: Monitor, records: list[dict[str, Any]]) -> None:
        for record in records:
            monitor.evaluation(record)
        if warning := repeats_warning(records[0]):
            monitor.warn_once("repeated targets", f"warning: {warning}")

    @region("evaluation")
    def _evaluate(self, part: HeldOut, step: int, keep_ranks_in: Path | None = None) -> list[dict[str, Any]]:
        """Raises Preempted on all ranks if one of them has been asked to stop."""

        def before_batch() -> None:
            self.watchdog.beat(f"evaluating step {step}")
            if self.world.sum(torch.tensor(int(self.preemption.requested), device=self.world.device)):
                raise Preempted(f"asked to stop while step {step} was evaluated; the same command resumes from there")

        return evaluate(self.recommender, self.dataset, self.config, part, step, before_batch, keep_ranks_in)

    def _total_steps(self, progress: Progress) -> int:
        """Steps of the whole run: up to ``progress``, then until `train.steps` or `train.epochs` is reached."""
        train = self.config.train
        if train.epochs is None:
            assert train.steps is not None
            return train.steps
        first = {progress.epoch: progress.sequences}  # of the sequences of that epoch
        epochs = range(progress.epoch, train.epochs)
        in_epochs = progress.step + sum(self.loader.num_batches(epoch, first.get(epoch, 0)) for epoch in epochs)
        return in_epochs if train.steps is None else min(train.steps, in_epochs)
