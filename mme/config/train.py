"""The keys of the section `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from mme.config.key import key

# OmegaConf reads the annotations of the dataclasses and knows Optional[X], not X | None; `key` returns a field.
# ruff: noqa: UP045, RUF009

TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass
class TrainConfig:
    """Length of training, optimizers, checkpoints, logging and monitoring."""

    steps: Optional[int] = key(None, "Stop after this many optimizer steps.", above=0)
    epochs: Optional[int] = key(
        10,
        "Stop after this many passes over the data, or after `steps` if that comes first. One of the two is required.",
        above=0,
    )
    lr: float = key(1e-3, "Learning rate of decoder, positions and experts (AdamW).", above=0, at_most=1e6)
    table_lr: Optional[float] = key(None, "Learning rate of the item tables; null: `lr`.", above=0)
    table_optimizer: Literal["adam", "dense_adam", "adagrad", "rowwise_adagrad", "sgd"] = key(
        "adam",
        "Optimizer of the item tables. `dense_adam` updates every row in every step, as the public FuXi-α code does, at a "
        "cost that grows with the catalogue. The others update only the rows that a step looks up. `adam` and `dense_adam` "
        "each give the same result on every device.",
    )
    weight_decay: float = key(0.0, "Weight decay of the decoder's AdamW.", at_least=0)
    weight_decay_on: Literal["all", "matrices"] = key(
        "all",
        "`all`: every weight of the decoder decays. `matrices`: only those of linear layers and experts, not biases, norms, "
        "positions, or the weights by time and distance.",
    )
    beta1: float = key(0.9, "Decay rate of the first moment.", at_least=0, below=1)
    beta2: float = key(0.98, "Decay rate of the second moment.", at_least=0, below=1)
    warmup_steps: int = key(0, "Steps over which the learning rates rise from 0.", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = key(
        "constant", "Learning rates after the warm-up; `cosine` decays to 0 at the last step."
    )
    micro_batches: int = key(
        1,
        "Parts into which a rank's batch is split. They pass through decoder and loss one after another, and their gradients "
        "are accumulated, which needs less memory for the same step. The load-balancing loss is the mean over the parts.",
        above=0,
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "Precision of matrix products in decoder and loss; `auto`: bfloat16 on GPUs, float32 on CPUs. Weights, gradients of "
        "weights, optimizer states, routers and evaluation scores stay float32. On GPUs float32 products may round their "
        "factors to TF32.",
    )
    recompute: Literal["none", "blocks"] = key(
        "none",
        "`blocks`: backward recomputes each block instead of keeping its activations. This needs less memory and about a "
        "third more time; results are bitwise equal.",
    )
    grad_clip: float = key(
        0.0,
        "Largest norm of the gradient of decoder, experts and tables together, over the global batch; 0: no limit.",
        at_least=0,
    )
    seed: int = key(
        42,
        "Seed of weights, data order, negatives and dropout. The same seed, configuration and global batch give bitwise equal "
        "losses on the same number of processes, and losses equal up to rounding on any number.",
        at_least=0,
    )
    eval_every: int = key(0, "Steps between evaluations on the validation split; 0: one after each epoch.", at_least=0)
    patience: int = key(
        0,
        "Stop after this many evaluations in a row without a higher validation NDCG@10; 0: never. Needs a validation split.",
        at_least=0,
    )
    checkpoint_every: int = key(0, "Steps between checkpoints; 0: one with each evaluation.", at_least=0)
    keep_checkpoints: int = key(2, "Number of newest checkpoints to keep, in addition to the best.", above=0)
    checkpoint_incremental: int = key(
        0,
        "Number of incremental checkpoints between two whole ones. They contain only the rows of the tables that have changed "
        "since the last whole one, unless more than half have. Resuming is exact from either.",
        at_least=0,
    )
    log_every: int = key(10, "Steps between lines of metrics.", above=0)
    trackers: list[str] = key(
        ["tensorboard"],
        "Experiment trackers that receive the curves: `tensorboard`, `wandb` and `mlflow` ([below](#trackers)).",
    )
    on_non_finite: Literal["stop", "skip"] = key(
        "stop",
        "Reaction to a NaN or infinity in the loss or a gradient. `stop`: the job ends with status 1. `skip`: the step changes "
        "nothing and is counted (`skipped_steps` in `metrics.jsonl`); after 100 skipped steps in a row the job stops. In "
        "both cases the batch is saved under `non_finite/`.",
    )
    hang_timeout_s: float = key(
        600.0,
        "If a rank makes no progress for this many seconds, the job names it, writes the stacks of all ranks to `stacks/` and "
        "ends with status 1, so that torchrun restarts it. Must be longer than the longest step, evaluation batch or "
        "checkpoint; 0: never.",
        at_least=0,
    )
    profile: int = key(
        0,
        "Steps to profile into `profile/` in the run's folder: a trace, time by part, and memory "
        "([benchmarks.md](benchmarks.md#profiling-a-run)); 0: none. Losses keep the same bits.",
        at_least=0,
    )
    profile_start: int = key(10, "Steps of this process before the profiled ones.", above=0)
    profile_ranks: list[int] = key([0], "Ranks that are profiled; empty: all.")
    resume: bool = key(
        True,
        "Resume from the newest complete checkpoint in `output_dir`, if there is one; false: remove all checkpoints there "
        "and start from step 0.",
    )
    init_from: Optional[str] = key(
        None,
        "Folder of another run: a run without checkpoints starts with the weights and optimizer states of that run's newest "
        "one. Rows are joined by raw id, and what does not fit is named ([every-day.md](every-day.md)).",
    )

    def precision_on(self, device_type: str) -> str:
        """The precision on ``cuda`` or ``cpu``: ``float32`` or ``bfloat16``."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if device_type == "cuda" else "float32"
