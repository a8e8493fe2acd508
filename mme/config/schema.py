"""The keys of the configuration. What other modules derive from several keys is a property or method here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Optional

from omegaconf import MISSING

from mme.config.key import key

USER_ID = "user_id"  # in `model.user_features`: the user itself, not a column

# OmegaConf reads the annotations of the dataclasses and knows Optional[X], not X | None; `key` returns a field.
# ruff: noqa: UP045, RUF009


@dataclass
class DataConfig:
    """What the model is trained on, and in which batches."""

    path: str = key(MISSING, "Training set: a folder written by `mme prepare`.")
    protocol: Literal["leave_one_out", "leave_two_out", "global_time"] = key(
        "leave_two_out",
        "What is held out. `leave_one_out`: each user's last event is the test target (the published protocol). "
        "`leave_two_out`: the last event is the test target; the one before it is the validation target, which selects the "
        "checkpoint. `global_time`: one cut-off time for all users; a user's first event from then on is the test target, the "
        "last one before it the validation target.",
    )
    global_time_test_fraction: float = key(
        0.1,
        "`global_time` only: the share of all events, the newest ones, that lie after the cut-off.",
        above=0,
        below=1,
    )
    max_seq_len: int = key(200, "N: how many of the newest events of a history the decoder reads.", above=0)
    batch_size: int = key(128, "Sequences per rank in a step.", above=0)
    tokens_per_batch: Optional[int] = key(
        None, "Tokens per rank in a step; replaces `batch_size` if given. Must be at least `max_seq_len`.", above=0
    )
    eval_batch_size: int = key(256, "Histories per rank in an evaluation step.", above=0)
    windows: Literal["newest", "sliding"] = key(
        "newest",
        "Which part of a history with more than N tokens is trained on. `newest`: the newest N. `sliding`: all of it, in "
        "windows; each target once an epoch.",
    )
    window_stride: Optional[int] = key(
        None,
        "`sliding` only: tokens from one window to the next, 1 to `max_seq_len`; null: `max_seq_len`. If smaller, a window "
        "begins with tokens that are only context, so that every target has at least N − stride tokens of history, or all "
        "that there are.",
    )
    readers: int = key(
        1,
        "Threads that assemble batches in advance and copy them to the GPU, two batches each. The order of the batches does "
        "not depend on it.",
        above=0,
    )
    cache_dir: Optional[str] = key(
        None,
        'Folder for the flat file of the events (docs/data.md, "Read in place"); null: inside the training set. Use it if '
        "the training set is read-only, or to have the file on a local disk.",
    )

    def history_len(self, has_user_token: bool) -> int:
        """The most events of a history that are read: N, or N - 1 if a user's token stands before them."""
        return self.max_seq_len - has_user_token


@dataclass
class MoEConfig:
    """The mixture of experts that replaces the dense FFN."""

    num_experts: int = key(8, "E: number of experts; 0: a dense FFN instead.", at_least=0)
    top_k: int = key(2, "k: experts that each token is sent to.")
    placement: list[int] = key([], "Blocks with experts, counted from 0; empty: all blocks.")
    router: Literal["view", "all_views"] = key(
        "view",
        "What decides which experts a view of a token is sent to: `view`, that view alone; `all_views`, all views of the "
        "token.",
    )
    renormalize: bool = key(True, "Scale the k chosen probabilities of a token to sum to 1.")
    capacity_factor: float = key(
        0.0,
        "Capacity of an expert, as a multiple of an even share of a rank's choices; first choices have priority, and a "
        "choice beyond the capacity adds nothing to its token. 0: no choice is dropped.",
        at_least=0,
    )
    load_balance_coef: float = key(
        0.01,
        "Weight of the load-balancing loss. A larger weight spreads tokens more evenly over the experts.",
        at_least=0,
    )
    z_loss_coef: float = key(
        0.0, "Weight of the router z-loss, which keeps the logits of the router small.", at_least=0
    )


@dataclass
class ModelConfig:
    """Fuxi-MME. FuXi-α is the same with one table and a dense FFN; the baselines have other blocks."""

    block: Literal["fuxi", "hstu", "sasrec"] = key(
        "fuxi",
        "Blocks of the decoder. `hstu` and `sasrec` are baselines with the same tables, data and loss; they require "
        "`moe.num_experts=0`. HSTU has no FFN.",
    )
    num_tables: int = key(
        4,
        "M: item-embedding tables. Each gives one view of the sequence, and all views pass through the same decoder. 1 with "
        "`moe.num_experts=0` is FuXi-α.",
        above=0,
    )
    embedding_dim: int = key(
        64, "D: width of all tables together; must be divisible by `num_tables`. A view has width D / M.", above=0
    )
    num_blocks: int = key(2, "Blocks of the decoder.", above=0)
    num_heads: int = key(1, "H: attention heads of a block.", above=0)
    dqk: Optional[int] = key(None, "Query and key width of a head; null: view width / `num_heads`.", above=0)
    dv: Optional[int] = key(None, "Value width of a head; null: view width / `num_heads`.", above=0)
    ffn_multiplier: float = key(
        4.0, "Hidden width of the FFN, or of one expert, as a multiple of the view width.", above=0
    )
    dropout: float = key(0.2, "Share of activations dropped in training.", at_least=0, below=1)
    positions: Literal["per_view", "shared"] = key(
        "per_view", "One table of learned positions per view, or one for all views."
    )
    score_norm: Literal["concat", "per_view"] = key(
        "concat",
        "`concat`: the views of user and item are concatenated, then normalised. `per_view`: each view is normalised, and "
        "the M cosines are averaged.",
    )
    event_features: list[str] = key(
        [],
        "Columns kept by `--feature-columns` of `mme prepare`, such as `[action,rating]`; their embeddings are added to the "
        "item's. See [data.md](data.md#other-features).",
    )
    user_features: list[str] = key(
        [],
        "Such columns, or `user_id` for the user; their embeddings sum to a token before the history, which counts towards "
        "`data.max_seq_len`.",
    )
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def view_dim(self) -> int:
        return self.embedding_dim // self.num_tables

    @property
    def head_dims(self) -> tuple[int, int]:
        """Width of a head's queries and keys, and of its values."""
        default = self.view_dim // self.num_heads
        return self.dqk or default, self.dv or default

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden layer of an FFN or expert."""
        return max(1, round(self.ffn_multiplier * self.view_dim))

    @property
    def router_views(self) -> int:
        """How many views of a token a router sees."""
        return self.num_tables if self.moe.router == "all_views" else 1

    @property
    def expert_blocks(self) -> list[int]:
        """The blocks with experts, ascending, counted from 0."""
        return sorted(set(self.moe.placement) or range(self.num_blocks)) if self.moe.num_experts else []

    @property
    def name(self) -> str:
        """The name of the model in metrics and reports: FuXi-α is the fuxi block with one table and dense FFNs."""
        if self.block != "fuxi":
            return self.block
        return "fuxi-alpha" if self.num_tables == 1 and not self.moe.num_experts else "fuxi-mme"

    @property
    def feature_columns(self) -> list[str]:
        """The columns of events and users that the model reads, each once."""
        return list(dict.fromkeys([*self.event_features, *self.user_features]))


@dataclass
class LossConfig:
    """Next-item prediction: softmax over the target and negatives, or over the whole catalogue."""

    # Tokens whose logits over the whole catalogue exist at the same time.
    FULL_SOFTMAX_TOKENS: ClassVar[int] = 1024

    kind: Literal["sampled_softmax", "full_softmax"] = key(
        "sampled_softmax",
        "Softmax over the target and sampled negatives, or over the whole catalogue (for small catalogues).",
    )
    negatives: Literal["per_token", "shared"] = key(
        "per_token",
        "Whether each token has its own negatives (the published protocol), or a group of tokens shares a set (faster).",
    )
    num_negatives: int = key(128, "Negatives of a token, or of a group of tokens.", above=0)
    negative_group_size: int = key(
        64,
        "`shared` only: consecutive tokens that share a set of negatives; 0: all tokens in the batch of a rank. Small groups "
        "keep the accuracy of `per_token`.",
        at_least=0,
    )
    sampling: Literal["uniform", "popularity", "in_batch"] = key(
        "uniform",
        "How negatives are sampled: uniformly from all items; from all items by how often they occur in training; from the "
        "targets of the global batch, which the ranks exchange once a step. A negative equal to the target is always masked.",
    )
    popularity_power: float = key(
        0.75,
        "`popularity` only: an item is sampled in proportion to its number of training events to this power. 1: as often as "
        "it occurs; 0: uniformly from the items that occur.",
        at_least=0,
    )
    uniform_share: float = key(
        0.0,
        "`popularity` and `in_batch` only: this share of the negatives is sampled uniformly from all items, so that items "
        "without training events are negatives too.",
        at_least=0,
        at_most=1,
    )
    log_q_correction: bool = key(
        False,
        "Subtract ln q from the logit of a negative, where q is the expected count of its item among the negatives of a "
        "token. See below.",
    )
    temperature: float = key(0.05, "Cosine scores are divided by this.", above=0)
    views: Literal["together", "each", "both"] = key(
        "together",
        "What predicts. `together`: one softmax over the summed scores of all views. `each`: one softmax over the cosines of "
        "each view; the loss is the mean of the M losses, so that each view learns to be right by itself, and ranking adds "
        "up their scores (requires `model.score_norm=per_view`). `both`: the mean of the two losses.",
    )

    @property
    def is_full_softmax(self) -> bool:
        return self.kind == "full_softmax"

    @property
    def group_size(self) -> int:
        """Consecutive tokens that share a set of negatives; 0: the whole batch."""
        return self.negative_group_size if self.negatives == "shared" else 1

    def num_groups(self, num_tokens: int) -> int:
        """How many sets of negatives are sampled for the tokens of one batch."""
        return math.ceil(num_tokens / (self.group_size or max(1, num_tokens)))

    def num_scored(self, num_items: int) -> int:
        """How many items the softmax of a token is over, target included, with a catalogue of ``num_items``."""
        return num_items if self.is_full_softmax else self.num_negatives + 1

    @property
    def num_passes(self) -> int:
        """How many times a token's D numbers are multiplied with those of each item that it scores."""
        return len(self.softmax_views(1))

    def softmax_views(self, num_tables: int) -> list[int]:
        """For each pass, how many views have their scores summed in one softmax; a pass has M / that many softmaxes."""
        return {"together": [num_tables], "each": [1], "both": [num_tables, 1]}[self.views]

    def num_softmaxes(self, num_tables: int) -> int:
        """Softmaxes of a token over all passes."""
        return sum(num_tables // views for views in self.softmax_views(num_tables))

    @property
    def needs_training_counts(self) -> bool:
        """Whether negatives or their correction depend on how often each item occurs in training."""
        return self.sampling == "popularity" or (self.sampling == "in_batch" and self.log_q_correction)


@dataclass
class TrainConfig:
    """Length of the training, optimizers, checkpoints, logging and what watches a job."""

    steps: Optional[int] = key(None, "Stop after this many optimizer steps.", above=0)
    epochs: Optional[int] = key(
        10,
        "Stop after this many passes over the data. If `steps` is given too, whichever comes first; one of them is "
        "required.",
        above=0,
    )
    lr: float = key(1e-3, "Learning rate of decoder, positions and experts (AdamW).", above=0, at_most=1e6)
    table_lr: Optional[float] = key(None, "Learning rate of the item tables; null: `lr`.", above=0)
    table_optimizer: Literal["adam", "dense_adam", "adagrad", "rowwise_adagrad", "sgd"] = key(
        "adam",
        "Optimizer of the item tables. `adam` moves the rows that a step looks up, `dense_adam` every row in every step, as "
        "the public FuXi-α code does, at a cost that grows with the catalogue; both give the same result on every device. "
        "The others move the rows that a step looks up.",
    )
    weight_decay: float = key(0.0, "Weight decay of the decoder's AdamW.", at_least=0)
    beta1: float = key(0.9, "Decay rate of the first moment.", at_least=0, below=1)
    beta2: float = key(0.98, "Decay rate of the second moment.", at_least=0, below=1)
    warmup_steps: int = key(0, "Steps over which the learning rates rise from 0.", at_least=0)
    lr_schedule: Literal["constant", "cosine"] = key(
        "constant", "Learning rates after the warm-up; `cosine` decays to 0 at the last step."
    )
    micro_batches: int = key(
        1,
        "Parts into which a rank's batch is split; they pass through decoder and loss one after another and their gradients "
        "are accumulated. Less memory, the same step; the load-balancing loss is the mean over the parts.",
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
        "`blocks`: backward recomputes each block instead of keeping its activations. The same bits with less memory, in "
        "about a third more time.",
    )
    grad_clip: float = key(
        0.0,
        "Largest norm of the gradient of decoder, experts and tables together, over the global batch; 0: no limit.",
        at_least=0,
    )
    seed: int = key(
        42,
        "Seed of weights, data order, negatives and dropout. The same seed, configuration and global batch give the same "
        "losses: bit for bit on as many processes, to rounding on any number of them.",
        at_least=0,
    )
    eval_every: int = key(0, "Steps between evaluations on the validation split; 0: one after each epoch.", at_least=0)
    checkpoint_every: int = key(0, "Steps between checkpoints; 0: one with each evaluation.", at_least=0)
    keep_checkpoints: int = key(2, "How many of the newest checkpoints are kept, besides the best.", above=0)
    log_every: int = key(10, "Steps between lines of metrics.", above=0)
    on_non_finite: Literal["stop", "skip"] = key(
        "stop",
        "What happens if a loss or gradient is not finite. `stop`: the job ends with status 1. `skip`: the step changes "
        "nothing and is counted (`skipped_steps` in `metrics.jsonl`); after 100 skipped steps in a row the job stops. In "
        "both cases the batch is saved under `non_finite/`.",
    )
    hang_timeout_s: float = key(
        600.0,
        "If a rank makes no progress for this many seconds, it is named, the stacks of all ranks are written under `stacks/` "
        "and the job ends with status 1, so that torchrun restarts it. Must be longer than the longest step, evaluation "
        "batch or checkpoint; 0: never.",
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
        "and start from the beginning.",
    )

    def precision_on(self, device_type: str) -> str:
        """``float32`` or ``bfloat16``: what `precision` means on ``cuda`` or ``cpu``."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if device_type == "cuda" else "float32"


@dataclass
class EvalConfig:
    """How targets are ranked."""

    seen: Literal["exclude", "include"] = key(
        "exclude",
        "Whether items that the user has had before are ranked. `exclude`, the published protocol: they are in no list, so a "
        "target among them is a miss, which counts as 0 in every metric. `include`: all items are ranked. Every result states "
        "`seen` and the share of such targets, `repeated_targets`; above 1% under `exclude`, a warning says so.",
    )


@dataclass
class ParallelConfig:
    """How model and tables are distributed over the ranks."""

    expert_parallel_size: int = key(
        0,
        "Ranks that share one set of experts; must divide `moe.num_experts` and the number of processes. 0: the largest "
        "number that divides both.",
        at_least=0,
    )
    table_sharding: Literal["auto", "row_wise", "column_wise", "table_wise", "data_parallel"] = key(
        "row_wise",
        "How the item tables are sharded over the ranks; `auto` leaves it to TorchRec's planner. `column_wise` does not go "
        "with `rowwise_adagrad`, whose state belongs to a whole row.",
    )
    zero_stage: int = key(1, "DeepSpeed ZeRO stage of the decoder.", at_least=1, at_most=2)


@dataclass
class KernelsConfig:
    """Which implementation of the kernels computes."""

    backend: Literal["auto", "torch", "triton"] = key(
        "auto", "Implementation of the kernels; `auto`: Triton on CUDA, PyTorch elsewhere."
    )


@dataclass
class Config:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    output_dir: str = key("runs/default", "Folder for configuration, metrics, checkpoints, logs and the report.")

    def experts_over(self, processes: int) -> int:
        """How many of a job's ``processes`` share one set of experts; if not set, the largest number that divides both."""
        num_experts = self.model.moe.num_experts
        return self.parallel.expert_parallel_size or (math.gcd(num_experts, processes) if num_experts else 1)

    @property
    def history_len(self) -> int:
        """See `DataConfig.history_len`."""
        return self.data.history_len(bool(self.model.user_features))
