"""The whole configuration: dataclasses are the schema, YAML files the values, dotted overrides the last word.

Imports nothing heavy, so that ``--help``, ``--dry-run`` and the launcher answer at once.
"""

from __future__ import annotations

import difflib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mme.errors import UserError, first_line
from mme.files import read_text, write_text
from mme.shipped import own_or_shipped

CONFIG_FILE = "config.yaml"  # in a run's folder
MAX_YAML_BYTES = 1 << 20
LONGEST_NAME, LONGEST_PATH = 255, 4095  # in bytes, of Linux
USER_ID = "user_id"  # of `model.user_features`: the user, not a column

# OmegaConf reads the annotations of the dataclasses and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class DataConfig:
    """Which sequences are trained on, and how they are cut."""

    path: str = MISSING  # folder written by `mme prepare`
    protocol: Literal["leave_one_out", "leave_two_out", "global_time"] = "leave_two_out"
    global_time_test_fraction: float = 0.1  # global_time: the newest share of all events that is test
    max_seq_len: int = 200  # N: the newest events of a history that the decoder reads
    batch_size: int = 128  # sequences per rank
    tokens_per_batch: Optional[int] = None  # tokens per rank; replaces batch_size where given
    eval_batch_size: int = 256  # histories per rank
    windows: Literal["newest", "sliding"] = "newest"  # of a longer history: the newest N tokens, or all in windows
    window_stride: Optional[int] = None  # sliding: tokens from one window to the next; default: max_seq_len
    readers: int = 1  # threads that assemble batches ahead
    cache_dir: Optional[str] = None  # where the flat file of the events is kept; default: in the data set's folder

    def history_len(self, has_user_token: bool) -> int:
        """The most events of a history that are read: N, or N - 1 where a user's token stands before them."""
        return self.max_seq_len - has_user_token


@dataclass
class MoEConfig:
    """The mixture of experts in place of the dense FFN."""

    num_experts: int = 8  # E; 0: dense FFN
    top_k: int = 2
    placement: list[int] = field(default_factory=list)  # blocks that have experts, from 0; empty: all
    router: Literal["view", "all_views"] = "view"  # what decides where a view of a token goes: it alone, or all views
    renormalize: bool = True  # the k chosen probabilities of a token sum to 1
    capacity_factor: float = 0.0  # room of an expert, as a multiple of an even share, per rank; 0: nothing is dropped
    load_balance_coef: float = 0.01
    z_loss_coef: float = 0.0


@dataclass
class ModelConfig:
    """Fuxi-MME; num_tables=1 with moe.num_experts=0 is FuXi-α, and the baselines are other blocks."""

    block: Literal["fuxi", "hstu", "sasrec"] = "fuxi"
    num_tables: int = 4  # M: item-embedding tables, one view of the sequence each
    embedding_dim: int = 64  # D: total width; a view has D / M
    num_blocks: int = 2
    num_heads: int = 1
    dqk: Optional[int] = None  # query and key width of a head; default: view width / num_heads
    dv: Optional[int] = None  # value width of a head; default: view width / num_heads
    ffn_multiplier: float = 4.0  # hidden width of the FFN or of one expert, in view widths
    dropout: float = 0.2
    positions: Literal["per_view", "shared"] = "per_view"
    score_norm: Literal["concat", "per_view"] = "concat"
    event_features: list[str] = field(default_factory=list)  # columns of the data set, added to each event's item
    user_features: list[str] = field(default_factory=list)  # columns, or user_id, summed to a token before the history
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
    """Next-item prediction by softmax over the target and negatives, or over the whole catalogue."""

    kind: Literal["sampled_softmax", "full_softmax"] = "sampled_softmax"
    negatives: Literal["per_token", "shared"] = "per_token"
    num_negatives: int = 128
    negative_group_size: int = 64  # shared: consecutive tokens with one set of negatives; 0: the whole batch
    # Drawn from all items alike, by how often they occur in training, or from the targets of the rank's batch.
    sampling: Literal["uniform", "popularity", "in_batch"] = "uniform"
    popularity_power: float = 0.75  # popularity: an item is drawn in proportion to its training events to this power
    uniform_share: float = 0.0  # popularity, in_batch: this share of the negatives is uniform all the same
    log_q_correction: bool = False  # subtract ln of how often an item is expected among the negatives from its logit
    temperature: float = 0.05
    # What predicts: the sum of the views' scores, each view by itself, or (the mean of the two losses) both.
    views: Literal["together", "each", "both"] = "together"

    # Tokens whose logits over the whole catalogue exist at the same time.
    FULL_SOFTMAX_TOKENS: ClassVar[int] = 1024

    @property
    def is_full_softmax(self) -> bool:
        return self.kind == "full_softmax"

    @property
    def group_size(self) -> int:
        """Consecutive tokens with one set of negatives; 0: the whole batch."""
        return self.negative_group_size if self.negatives == "shared" else 1

    def num_groups(self, num_tokens: int) -> int:
        """How many sets of negatives are sampled for the tokens of one batch: its groups."""
        return math.ceil(num_tokens / (self.group_size or max(1, num_tokens)))

    def num_scored(self, num_items: int) -> int:
        """How many items the softmax of a token is over, its target included, with a catalogue of ``num_items``."""
        return num_items if self.is_full_softmax else self.num_negatives + 1

    @property
    def num_passes(self) -> int:
        """How many times a token's whole width D is multiplied with each item that it scores."""
        return len(self.softmax_views(1))

    def softmax_views(self, num_tables: int) -> list[int]:
        """For each pass, the number of views whose scores are summed in one softmax: the M views have M / that many."""
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
    """How long, how fast and how watched."""

    steps: Optional[int] = None  # stop after this many optimizer steps …
    epochs: Optional[int] = 10  # … or this many passes over the data, whichever comes first
    lr: float = 1e-3  # decoder, positions and experts (AdamW)
    table_lr: Optional[float] = None  # item tables; default: lr
    table_optimizer: Literal["adam", "adagrad", "rowwise_adagrad", "sgd"] = "adam"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    micro_batches: int = 1  # parts in which a rank's batch passes through the decoder, one after another
    precision: Literal["float32", "bfloat16"] = "float32"  # of the decoder's and the loss's products; weights: float32
    recompute: Literal["none", "blocks"] = "none"  # blocks: backward runs each block again instead of keeping it
    grad_clip: float = 0.0  # largest global norm of the gradient of decoder and tables; 0: no limit
    seed: int = 42
    eval_every: int = 0  # steps between evaluations on the validation split; 0: after each epoch
    checkpoint_every: int = 0  # steps between checkpoints; 0: with each evaluation
    keep_checkpoints: int = 2  # newest ones kept, besides the best
    log_every: int = 10  # steps between lines of metrics
    on_non_finite: Literal["stop", "skip"] = (
        "stop"  # a loss or gradient that is not finite: end the job, or leave the step
    )
    hang_timeout_s: float = 600.0  # a rank without progress for so long ends the job, to be started again; 0: never
    profile: int = 0  # steps to be profiled into the run's profile/; 0: none
    profile_start: int = 10  # steps of this process before them
    profile_ranks: list[int] = field(default_factory=lambda: [0])  # which processes; empty: all
    resume: bool = True  # go on from output_dir's newest complete checkpoint; false: remove all there and start anew


@dataclass
class ParallelConfig:
    """What is split over the ranks."""

    expert_parallel_size: int = 0  # ranks that share one set of experts; 0: as many as divide both experts and ranks
    table_sharding: Literal["auto", "row_wise", "column_wise", "table_wise", "data_parallel"] = "row_wise"
    zero_stage: int = 1


@dataclass
class KernelsConfig:
    backend: Literal["auto", "torch", "triton"] = "auto"  # auto: triton on CUDA, torch elsewhere


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    output_dir: str = "runs/default"

    def experts_over(self, processes: int) -> int:
        """How many of a job's ``processes`` share one set of experts: the largest number that divides both, if none is set."""
        num_experts = self.model.moe.num_experts
        return self.parallel.expert_parallel_size or (math.gcd(num_experts, processes) if num_experts else 1)

    @property
    def history_len(self) -> int:
        """See `DataConfig.history_len`."""
        return self.data.history_len(bool(self.model.user_features))


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The configuration of ``path`` (YAML; None: the defaults) with ``key.path=value`` overrides, validated.

    ``configs/NAME.yaml`` also finds the shipped configuration where the working folder has none.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, a value has the wrong type or two values
            cannot go together.
    """
    return _validated(path, None if path is None else _read_yaml(own_or_shipped(Path(path))), overrides or [])


def load_saved_config(run: Path) -> Config:
    """The configuration in a run's folder, as `save_config` wrote it.

    The folder may come from a stranger: no link in it is followed, and an interpolation such as ``${oc.env:HOME}``, which
    would copy the reader's environment into a report or a log, is refused.

    Raises:
        UserError: see `load_config`.
    """
    path = run / CONFIG_FILE
    values = _read_yaml(path, root=run)
    for key, node in _nodes("", values):
        if node is not None and node._is_interpolation():
            raise UserError(
                f"{path}: {key}: {node._value()!r} is not resolved in a run's configuration: expected a value"
            )
    return _validated(path, values, [])


def load_run_config(run: Path) -> Config:
    """The configuration of a trained run, for commands that read the run on any number of processes.

    The experts lie as the processes allow. Files that these commands write go into ``run`` and the data set's folder,
    whatever the configuration says.

    Raises:
        UserError: see `load_config`.
    """
    config = load_saved_config(run)
    config.parallel.expert_parallel_size = 0
    config.output_dir, config.data.cache_dir = str(run), None
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML that `load_config` reads back."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)), path.parent)


def _validated(path: str | Path | None, values: DictConfig | None, overrides: list[str]) -> Config:
    schema = OmegaConf.structured(Config)
    merged = schema if values is None else _merge(schema, values, source=str(path))
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"override {override!r}: expected key.path=value, such as train.steps=100")
        try:
            value = OmegaConf.from_dotlist([override])
        except Exception as error:  # the YAML reader's own errors have no common base
            raise UserError(f"override {override!r}: {first_line(error)}") from error
        merged = _merge(merged, value, source=f"override {override!r}")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path or 'configuration'}: {missing[0]} is required, such as {missing[0]}=…")
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # an interpolation ${…} that leads nowhere
        raise UserError(f"{path or 'configuration'}: {first_line(error)}") from error
    validate(config)
    return config


def flat(config: Config) -> dict[str, Any]:
    """Each value by its whole key, such as ``train.lr``."""

    def of(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from of(f"{prefix}{key}.", value)
            else:
                yield f"{prefix}{key}", value

    return dict(of("", asdict(config)))


def validate(config: Config) -> None:
    """Raises UserError for a value out of range or values that cannot go together."""
    data, model, moe, loss, train, parallel = (
        config.data,
        config.model,
        config.model.moe,
        config.loss,
        config.train,
        config.parallel,
    )
    _require_finite(config)
    _require_paths(config)
    _require_positive("data", data, ["max_seq_len", "batch_size", "eval_batch_size", "readers"])
    _require_positive("model", model, ["num_tables", "embedding_dim", "num_blocks", "num_heads", "ffn_multiplier"])
    _require_positive("loss", loss, ["num_negatives", "temperature"])
    _require_positive("train", train, ["lr", "log_every", "keep_checkpoints", "micro_batches", "profile_start"])
    for section, key, value in [
        ("data", "tokens_per_batch", data.tokens_per_batch),
        ("model", "dqk", model.dqk),
        ("model", "dv", model.dv),
        ("train", "steps", train.steps),
        ("train", "epochs", train.epochs),
        ("train", "table_lr", train.table_lr),
    ]:
        if value is not None and value <= 0:
            raise UserError(f"{section}.{key} ({value}) must be positive")
    for section, keys in {
        "train": [
            "weight_decay",
            "warmup_steps",
            "grad_clip",
            "eval_every",
            "checkpoint_every",
            "hang_timeout_s",
            "profile",
            "seed",
        ],
        "loss": ["negative_group_size", "popularity_power"],
        "model.moe": ["num_experts", "capacity_factor", "load_balance_coef", "z_loss_coef"],
        "parallel": ["expert_parallel_size"],
    }.items():
        values: Any = {"train": train, "loss": loss, "model.moe": moe, "parallel": parallel}[section]
        for key in keys:
            if not getattr(values, key) >= 0:
                raise UserError(f"{section}.{key} ({getattr(values, key)}) must not be negative")
    if train.steps is None and train.epochs is None:
        raise UserError("train.steps and train.epochs are both null: one must say when to stop")
    for name, share in (
        ("model.dropout", model.dropout),
        ("train.beta1", train.beta1),
        ("train.beta2", train.beta2),
    ):
        if not 0 <= share < 1:
            raise UserError(f"{name} ({share}) must be at least 0 and below 1")
    if not 0 <= loss.uniform_share <= 1:
        raise UserError(f"loss.uniform_share ({loss.uniform_share}) must lie between 0 and 1")
    if loss.kind == "full_softmax" and (loss.sampling != "uniform" or loss.log_q_correction):
        raise UserError(
            "loss.kind=full_softmax has no negatives: loss.sampling and loss.log_q_correction go with sampled_softmax"
        )
    if loss.views == "each" and model.score_norm != "per_view":
        raise UserError(
            "loss.views=each trains the cosine of each view, not how views weigh against each other: it needs "
            "model.score_norm=per_view, or choose loss.views=both"
        )
    if not 0 < data.global_time_test_fraction < 1:
        raise UserError(
            f"data.global_time_test_fraction ({data.global_time_test_fraction}) must lie between 0 and 1, both excluded"
        )
    if model.embedding_dim % model.num_tables:
        raise UserError(
            f"model.embedding_dim ({model.embedding_dim}) must be divisible by model.num_tables ({model.num_tables})"
        )
    for key, names in (("event_features", model.event_features), ("user_features", model.user_features)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"model.{key} names {twice} twice")
    if USER_ID in model.event_features:
        raise UserError(f"model.event_features names {USER_ID}, which is of users: expected in model.user_features")
    if config.history_len < 1:
        raise UserError(f"data.max_seq_len ({data.max_seq_len}) must be at least 2 with model.user_features")
    if model.view_dim % model.num_heads and (model.dqk is None or model.dv is None):
        raise UserError(
            f"the view width embedding_dim / num_tables ({model.view_dim}) must be divisible by model.num_heads "
            f"({model.num_heads}) unless model.dqk and model.dv are given"
        )
    if data.tokens_per_batch is not None and data.tokens_per_batch < data.max_seq_len:
        raise UserError(
            f"data.tokens_per_batch ({data.tokens_per_batch}) must be at least data.max_seq_len ({data.max_seq_len})"
        )
    if data.window_stride is not None:
        if data.windows != "sliding":
            raise UserError(f"data.window_stride ({data.window_stride}) needs data.windows=sliding")
        if not 1 <= data.window_stride <= config.history_len:
            less = " - 1, for the user's token," if model.user_features else ""
            raise UserError(
                f"data.window_stride ({data.window_stride}) must be between 1 and data.max_seq_len{less} "
                f"({config.history_len})"
            )
    if moe.num_experts and not 1 <= moe.top_k <= moe.num_experts:
        raise UserError(f"model.moe.top_k ({moe.top_k}) must be between 1 and num_experts ({moe.num_experts})")
    if moe.num_experts and parallel.expert_parallel_size and moe.num_experts % parallel.expert_parallel_size:
        raise UserError(
            f"model.moe.num_experts ({moe.num_experts}) must be divisible by parallel.expert_parallel_size "
            f"({parallel.expert_parallel_size})"
        )
    if moe.num_experts and model.block != "fuxi":
        raise UserError(
            f"model.moe.num_experts ({moe.num_experts}) must be 0 with model.block={model.block}: only fuxi has experts"
        )
    for block in moe.placement:
        if not 0 <= block < model.num_blocks:
            raise UserError(
                f"model.moe.placement names block {block}: expected 0 to {model.num_blocks - 1} (num_blocks "
                f"{model.num_blocks})"
            )
    if parallel.zero_stage not in (1, 2):
        raise UserError(f"parallel.zero_stage ({parallel.zero_stage}) must be 1 or 2")


def validate_world_size(config: Config, world_size: int) -> None:
    """Raises UserError where experts or profile do not fit to ``world_size`` processes."""
    for rank in config.train.profile_ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"train.profile_ranks names rank {rank}: expected 0 to {world_size - 1}")
    size = config.parallel.expert_parallel_size
    if config.model.moe.num_experts and size and world_size % size:
        raise UserError(
            f"parallel.expert_parallel_size ({size}) must divide the number of processes ({world_size}): choose a "
            f"divisor of {world_size}, or 0 for the largest that fits"
        )


def _require_finite(config: Config) -> None:
    for key, value in flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} ({value}) must be finite")


def _require_paths(config: Config) -> None:
    data = config.data
    for key, path in (("data.path", data.path), ("data.cache_dir", data.cache_dir), ("output_dir", config.output_dir)):
        longest = max(map(len, os.fsencode(path or "").split(b"/")))
        if "\0" in (path or ""):
            raise UserError(f"{key}: {path!r} holds a NUL character: expected the path of a folder")
        if longest > LONGEST_NAME or len(os.fsencode(path or "")) > LONGEST_PATH:
            raise UserError(
                f"{key}: {path!r:.40}… is no path: expected at most {LONGEST_PATH} bytes, {LONGEST_NAME} for a name in it"
            )


def _require_positive(section: str, values: Any, keys: list[str]) -> None:
    for key in keys:
        if not getattr(values, key) > 0:
            raise UserError(f"{section}.{key} ({getattr(values, key)}) must be positive")


def _read_yaml(path: Path, root: Path | None = None) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(read_text(path, root, MAX_YAML_BYTES)))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such configuration file") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected a configuration file") from error
    except Exception as error:  # the YAML reader's own errors have no common base
        raise UserError(f"{path}: not a YAML configuration: {first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: expected a mapping of sections (data, model, …), found a list")
    return loaded


def _merge(base: Any, update: Any, source: str) -> Any:
    for key, node in _nodes("", update):
        if isinstance(node, DictConfig) and isinstance(OmegaConf.select(base, key), ListConfig):
            raise UserError(f"{source}: {key}: expected a list, found a mapping")
    try:
        return OmegaConf.merge(base, update)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        hint = _nearest_key(base, key) if type(error).__name__ == "ConfigKeyError" else ""
        reason = "unknown key" if hint is not None and type(error).__name__ == "ConfigKeyError" else first_line(error)
        raise UserError(f"{source}: {key}: {reason}{hint}") from error


def _nodes(prefix: str, container: Any) -> Iterator[tuple[str, Any]]:
    """Every key below ``container`` and its node, without resolving interpolations."""
    if container._is_none() or container._is_missing() or container._is_interpolation():
        return
    keys = range(len(container)) if isinstance(container, ListConfig) else container
    for key in keys:
        node = container._get_node(key)
        yield f"{prefix}{key}", node
        if isinstance(node, (DictConfig, ListConfig)):
            yield from _nodes(f"{prefix}{key}.", node)


def _nearest_key(base: Any, key: str) -> str:
    section, _, _ = key.rpartition(".")
    known = OmegaConf.select(base, section) if section else base
    names = [f"{section}.{name}" if section else str(name) for name in known] if known is not None else []
    near = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(names)})"
