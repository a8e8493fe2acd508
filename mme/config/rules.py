"""Validates a configuration: ranges of single keys and rules between keys."""

from __future__ import annotations

import math

from mme.config.key import RANGE, keys_of
from mme.config.schema import USER_ID, Config
from mme.config.train import TRACKERS
from mme.errors import UserError
from mme.paths import check_path, remote_url

LARGEST_FLOAT32 = 3.4028234663852886e38


def validate(config: Config) -> None:
    """Raises UserError if a value is out of range or values contradict each other."""
    _check_ranges(config)
    _check_paths(config)
    _check_model(config)
    _check_tables(config)
    _check_table_lr(config)
    _check_experts(config)
    _check_loss(config)
    _check_target_weights(config)
    _check_data(config)
    if config.train.patience and config.data.protocol == "leave_one_out":
        raise UserError(
            f"train.patience ({config.train.patience}) needs a validation split, which data.protocol=leave_one_out does not "
            "have: expected leave_two_out or global_time"
        )
    _check_trackers(config.train.trackers)
    if config.train.steps is None and config.train.epochs is None:
        raise UserError("train.steps and train.epochs are both null: expected at least one of them")


def _check_trackers(names: list[str]) -> None:
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"train.trackers names {name!r}: expected {', '.join(TRACKERS)}")
        if names.count(name) > 1:
            raise UserError(f"train.trackers names {name} twice")


def validate_world_size(config: Config, world_size: int) -> None:
    """Raises UserError if the configuration cannot be trained on ``world_size`` processes."""
    for rank in config.train.profile_ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"train.profile_ranks names rank {rank}: expected 0 to {world_size - 1}")
    size = config.parallel.expert_parallel_size
    if config.model.moe.num_experts and size and world_size % size:
        raise UserError(
            f"parallel.expert_parallel_size ({size}) must divide the number of processes ({world_size}): choose a "
            f"divisor of {world_size}, or 0 for the largest that fits"
        )


def warnings(config: Config) -> list[str]:
    """Warnings about settings that are valid but probably not intended, one line each."""
    moe = config.model.moe
    if moe.num_experts and moe.top_k == 1 and moe.renormalize:
        return [
            "model.moe.top_k=1 with renormalize=true gives each token's expert the weight p / p = 1, so the router gets no "
            "gradient from the task, only from its balance losses; renormalize=false keeps p"
        ]
    return []


def _check_ranges(config: Config) -> None:
    for name, field, value in keys_of(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} ({value}) must be finite")
        allowed = field.metadata.get(RANGE)
        if allowed and value is not None and not allowed.holds(value):
            raise UserError(f"{name} ({value}) must be {allowed.phrase()}")


def _check_paths(config: Config) -> None:
    data = config.data
    for key, path in (("data.path", data.path), ("data.cache_dir", data.cache_dir), ("output_dir", config.output_dir)):
        if key != "data.path" or remote_url(data.path) is None:
            check_path(path or "", key)


def _check_target_weights(config: Config) -> None:
    loss = config.loss
    if loss.target_weights and loss.weight_column is None:
        raise UserError("loss.target_weights needs loss.weight_column, the column of the values that it names")
    try:
        loss.weight_of_value()
    except ValueError:
        raise UserError(
            f"loss.target_weights ({', '.join(loss.target_weights)}): expected VALUE=WEIGHT, each value once and each weight "
            "a number from 0"
        ) from None
    if loss.weight_column is not None and loss.sampling == "in_batch":
        raise UserError(
            "loss.weight_column does not go with loss.sampling=in_batch, because a batch may have no target: expected uniform "
            "or popularity"
        )


def _check_model(config: Config) -> None:
    model = config.model
    if model.embedding_dim % model.num_tables:
        raise UserError(
            f"model.embedding_dim ({model.embedding_dim}) must be divisible by model.num_tables ({model.num_tables})"
        )
    for key, names in (("event_features", model.event_features), ("user_features", model.user_features)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"model.{key} names {twice} twice")
    if USER_ID in model.event_features:
        raise UserError(
            f"model.event_features names {USER_ID}, which is a feature of users: expected it in model.user_features"
        )
    if model.view_dim % model.num_heads and (model.dqk is None or model.dv is None):
        raise UserError(
            f"the view width embedding_dim / num_tables ({model.view_dim}) must be divisible by model.num_heads "
            f"({model.num_heads}) unless model.dqk and model.dv are set"
        )


def _check_tables(config: Config) -> None:
    if config.train.table_optimizer == "rowwise_adagrad" and config.parallel.table_sharding == "column_wise":
        raise UserError(
            "parallel.table_sharding=column_wise: train.table_optimizer=rowwise_adagrad has one state per row, which "
            "column_wise would split; expected row_wise, table_wise, data_parallel or auto"
        )

    parallel = config.parallel
    needs_fused = []
    if parallel.table_placement in ("uvm", "uvm_caching"):
        needs_fused.append(f"parallel.table_placement={parallel.table_placement}")
    if parallel.table_dtype != "float32":
        needs_fused.append(f"parallel.table_dtype={parallel.table_dtype}")
    for key in needs_fused:
        needs = f"{key} needs tables that FBGEMM updates row by row"
        if parallel.table_sharding == "data_parallel":
            raise UserError(
                f"{needs}, not parallel.table_sharding=data_parallel: expected row_wise, column_wise, table_wise or auto"
            )
        if config.train.table_optimizer == "dense_adam":
            raise UserError(
                f"{needs}, not train.table_optimizer=dense_adam: expected adam, adagrad, rowwise_adagrad or sgd"
            )
    if parallel.table_dtype == "bfloat16" and parallel.table_placement == "uvm_caching":
        raise UserError(
            "parallel.table_dtype=bfloat16: the cache of parallel.table_placement=uvm_caching is float32 or float16: expected "
            "one of these, or device or uvm"
        )
    if config.parallel.exchange_dtype != "float32" and config.parallel.table_sharding == "data_parallel":
        raise UserError(
            f"parallel.exchange_dtype={config.parallel.exchange_dtype}: parallel.table_sharding=data_parallel exchanges no rows: "
            "expected float32, or another sharding"
        )


def _check_table_lr(config: Config) -> None:
    """Raises UserError if train.table_lr / (1 − beta1), the rate of Adam's first step, exceeds the range of float32."""
    train = config.train
    lr = train.table_lr or train.lr
    largest = LARGEST_FLOAT32 * (1 - train.beta1)
    if train.table_optimizer in ("adam", "dense_adam") and lr > largest:
        raise UserError(
            f"train.table_lr ({lr}) must be at most {largest:.3g} with train.table_optimizer={train.table_optimizer} and "
            f"train.beta1={train.beta1}"
        )
    if lr > LARGEST_FLOAT32:
        raise UserError(f"train.table_lr ({lr}) must be at most {LARGEST_FLOAT32:.3g}, the largest float32")


def _check_experts(config: Config) -> None:
    model, moe, parallel = config.model, config.model.moe, config.parallel
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


def _check_loss(config: Config) -> None:
    loss = config.loss
    if loss.is_full_softmax and (loss.sampling != "uniform" or loss.log_q_correction):
        raise UserError(
            "loss.kind=full_softmax has no negatives: loss.sampling and loss.log_q_correction need loss.kind=sampled_softmax"
        )
    if loss.views == "each" and config.model.score_norm != "per_view":
        raise UserError(
            "loss.views=each trains each view's cosine but not the weights between views: set model.score_norm=per_view, or "
            "choose loss.views=both"
        )


def _check_data(config: Config) -> None:
    data = config.data
    if config.history_len < 1:
        raise UserError(f"data.max_seq_len ({data.max_seq_len}) must be at least 2 with model.user_features")
    if data.tokens_per_batch is not None and data.tokens_per_batch < data.max_seq_len:
        raise UserError(
            f"data.tokens_per_batch ({data.tokens_per_batch}) must be at least data.max_seq_len ({data.max_seq_len})"
        )
    if data.window_stride is not None:
        if data.windows != "sliding":
            raise UserError(f"data.window_stride ({data.window_stride}) needs data.windows=sliding")
        if not 1 <= data.window_stride <= config.history_len:
            less = " - 1, for the user's token," if config.model.user_features else ""
            raise UserError(
                f"data.window_stride ({data.window_stride}) must be between 1 and data.max_seq_len{less} "
                f"({config.history_len})"
            )
