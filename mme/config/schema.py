"""The keys of the configuration. Values that several modules derive from keys are properties or methods here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Optional

from omegaconf import MISSING

from mme.config.key import key
from mme.config.parallel import ParallelConfig
from mme.config.train import TrainConfig

USER_ID = "user_id"  # in `model.user_features`: the user itself, not a column

# OmegaConf reads the annotations of the dataclasses and knows Optional[X], not X | None; `key` returns a field.
# ruff: noqa: UP045, RUF009


@dataclass
class DataConfig:
    """The training data and how it is batched."""

    path: str = key(MISSING, "Training set: a folder written by `mme prepare`.")
    protocol: Literal["leave_one_out", "leave_two_out", "global_time"] = key(
        "leave_two_out",
        "What is held out. `leave_one_out`: each user's last event is the test target (the published protocol). "
        "`leave_two_out`: the last event is the test target; the one before it is the validation target, which selects the "
        "checkpoint. `global_time`: one cut-off time for all users; a user's first event at or after it is the test target, "
        "the last event before it the validation target.",
    )
    global_time_test_fraction: float = key(
        0.1,
        "`global_time` only: the share of all events that are newer than the cut-off.",
        above=0,
        below=1,
    )
    max_seq_len: int = key(200, "N: the decoder reads the newest N events of a history.", above=0)
    batch_size: int = key(128, "Sequences per rank in a step.", above=0)
    tokens_per_batch: Optional[int] = key(
        None, "Tokens per rank in a step; replaces `batch_size` if set. Must be at least `max_seq_len`.", above=0
    )
    eval_batch_size: int = key(256, "Histories per rank in an evaluation step.", above=0)
    windows: Literal["newest", "sliding"] = key(
        "newest",
        "The part of a history with more than N tokens that is trained on. `newest`: the newest N. `sliding`: all of it, in "
        "windows, with each target once per epoch.",
    )
    window_stride: Optional[int] = key(
        None,
        "`sliding` only: tokens from one window to the next, 1 to `max_seq_len`; null: `max_seq_len`. If smaller, a window "
        "begins with tokens that are only context, so that every target has at least N − stride tokens of history, if there "
        "are that many.",
    )
    readers: int = key(
        1,
        "Threads that prefetch batches and copy them to the GPU, two batches each. The order of the batches does not depend "
        "on it.",
        above=0,
    )
    cache_dir: Optional[str] = key(
        None,
        'Folder for the flat file of the events (docs/data.md, "Read in place"); null: inside the training set. Set it if '
        "the training set is read-only, or to keep the file on a local disk.",
    )

    @property
    def rank_batch(self) -> str:
        """The batch size of each process, ``64 sequences`` or ``4096 tokens``."""
        return f"{self.batch_size} sequences" if self.tokens_per_batch is None else f"{self.tokens_per_batch} tokens"

    def history_len(self, has_user_token: bool) -> int:
        """The maximum number of events of a history: N, or N - 1 if a user's token precedes them."""
        return self.max_seq_len - has_user_token


@dataclass
class MoEConfig:
    """The mixture of experts that replaces the dense FFN."""

    num_experts: int = key(8, "E: number of experts; 0: a dense FFN instead.", at_least=0)
    top_k: int = key(2, "k: number of experts per token.")
    placement: list[int] = key([], "Blocks with experts, counted from 0; empty: all blocks.")
    router: Literal["view", "all_views"] = key(
        "view",
        "The router's input for a view of a token. `view`: that view; `all_views`: all views of the token.",
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
class SASRecConfig:
    """Choices in which public versions of SASRec differ."""

    norm_first: bool = key(
        True, "Layer norms before attention and FFN, as in the paper; false: after the residual sums, as in BERT."
    )
    attention_output_dropout: bool = key(True, "Dropout on the output of attention, not only on its weights.")


@dataclass
class ModelConfig:
    """Fuxi-MME. FuXi-α is the same model with one table and a dense FFN; the baselines have other blocks."""

    block: Literal["fuxi", "hstu", "sasrec", "ligr"] = key(
        "fuxi",
        "Blocks of the decoder. `hstu`, `sasrec` and `ligr` (the block of eSASRec) are baselines with the same tables, data "
        "and loss; they require `moe.num_experts=0`. HSTU has no FFN.",
    )
    num_tables: int = key(
        4,
        "M: item-embedding tables. Each gives one view of the sequence, and all views pass through the same decoder. One "
        "table with `moe.num_experts=0` is FuXi-α.",
        above=0,
    )
    embedding_dim: int = key(
        64, "D: total width of all tables; must be divisible by `num_tables`. A view has width D / M.", above=0
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
    positions_from: Literal["oldest", "newest"] = key(
        "oldest",
        "`oldest`: the oldest token of a sequence has position 0. `newest`: the newest has position N − 1, as in models that "
        "pad on the left.",
    )
    final_norm: bool = key(False, "A layer norm with scale and bias after the last block, as in SASRec and eSASRec.")
    score_norm: Literal["concat", "per_view", "none"] = key(
        "concat",
        "`concat`: the views of user and item are concatenated, then normalised. `per_view`: each view is normalised, and "
        "the M cosines are averaged. `none`: scores are dot products, as in SASRec (`loss.temperature=1`).",
    )
    event_features: list[str] = key(
        [],
        "Columns kept by `--feature-columns` of `mme prepare`, such as `[action,rating]`; their embeddings are added to the "
        "item's. See [data.md](data.md#other-features).",
    )
    user_features: list[str] = key(
        [],
        "Columns as in `event_features`, or `user_id` for the user; their embeddings sum to a token before the history, "
        "which counts towards `data.max_seq_len`.",
    )
    new_items: Literal["mean", "random"] = key(
        "mean",
        "Initial weights of table rows that are new after the data set has grown or with `train.init_from`: the mean of the "
        "rows of their kind that continue, or random as in a new model.",
    )
    moe: MoEConfig = field(default_factory=MoEConfig)
    sasrec: SASRecConfig = field(default_factory=SASRecConfig)

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
        """Number of a token's views that a router sees."""
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
        "`per_token`: each token has its own negatives (the published protocol). `shared`: a group of tokens shares a set "
        "(faster).",
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
        "Negative distribution. `uniform`: uniform over all items. `popularity`: by the items' frequency in training. "
        "`in_batch`: the targets of the global batch, which the ranks exchange once per step. A negative equal to the target "
        "is always masked.",
    )
    popularity_power: float = key(
        0.75,
        "`popularity` only: an item's probability is proportional to its number of training events raised to this power. 1: "
        "proportional to its frequency; 0: uniform over the items that occur in training.",
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
    temperature: float = key(0.05, "Scores are divided by this; it is chosen for cosines.", above=0)
    views: Literal["together", "each", "both"] = key(
        "together",
        "`together`: one softmax over the summed scores of all views. `each`: one softmax per view over its cosines; the loss "
        "is the mean of the M losses, so that each view learns to predict on its own, and ranking sums their scores (requires "
        "`model.score_norm=per_view`). `both`: the mean of the two losses.",
    )
    weight_column: Optional[str] = key(
        None,
        "Column kept by `--feature-columns` of `mme prepare` whose value in the event to be predicted gives the weight of "
        "that target in the loss. None: all targets have the same weight. See [data.md](data.md#actions-and-weights).",
    )
    target_weights: list[str] = key(
        [],
        "`VALUE=WEIGHT` for each value of `loss.weight_column` that is a target, such as `[buy=1,click=0.2]`; other events are "
        "context only. Empty: the values are numbers and are the weights.",
    )

    def weight_of_value(self) -> dict[str, float]:
        """`target_weights` by value.

        Raises:
            ValueError: an entry is not VALUE=WEIGHT with a finite weight from 0, or a value occurs twice.
        """
        found: dict[str, float] = {}
        for entry in self.target_weights:
            value, separator, weight = entry.rpartition("=")
            number = float(weight) if separator else math.nan
            if value in found or not 0 <= number < 1e30:
                raise ValueError(entry)
            found[value] = number
        return found

    @property
    def is_full_softmax(self) -> bool:
        return self.kind == "full_softmax"

    @property
    def group_size(self) -> int:
        """Consecutive tokens that share a set of negatives; 0: the whole batch."""
        return self.negative_group_size if self.negatives == "shared" else 1

    def num_groups(self, num_tokens: int) -> int:
        """Number of sets of negatives that are sampled for the tokens of one batch."""
        return math.ceil(num_tokens / (self.group_size or max(1, num_tokens)))

    def num_scored(self, num_items: int) -> int:
        """Number of items in a token's softmax, including the target, for a catalogue of ``num_items``."""
        return num_items if self.is_full_softmax else self.num_negatives + 1

    @property
    def num_passes(self) -> int:
        """Number of times that a token's D numbers are multiplied with those of each scored item."""
        return len(self.softmax_views(1))

    def softmax_views(self, num_tables: int) -> list[int]:
        """For each pass, the number of views whose scores one softmax sums; the pass has M / that many softmaxes."""
        return {"together": [num_tables], "each": [1], "both": [num_tables, 1]}[self.views]

    def num_softmaxes(self, num_tables: int) -> int:
        """Number of softmaxes of a token in all passes."""
        return sum(num_tables // views for views in self.softmax_views(num_tables))

    @property
    def needs_training_counts(self) -> bool:
        """Whether negatives or their correction depend on the items' frequencies in training."""
        return self.sampling == "popularity" or (self.sampling == "in_batch" and self.log_q_correction)


@dataclass
class EvalConfig:
    """The ranking of targets in an evaluation."""

    seen: Literal["exclude", "include"] = key(
        "exclude",
        "Ranking of items in the user's history. `exclude` (the published protocol): they are in no list, so a target among "
        "them is a miss, which counts as 0 in every metric. `include`: all items are ranked. Every result states `seen` and "
        "`repeated_targets`, the share of such targets; `exclude` warns above 1%.",
    )


@dataclass
class KernelsConfig:
    """The implementation of the kernels."""

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
        """Number of a job's ``processes`` that share one set of experts; by default the largest that divides both."""
        num_experts = self.model.moe.num_experts
        return self.parallel.expert_parallel_size or (math.gcd(num_experts, processes) if num_experts else 1)

    @property
    def history_len(self) -> int:
        """See `DataConfig.history_len`."""
        return self.data.history_len(bool(self.model.user_features))
