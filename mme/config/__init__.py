"""The configuration: dataclasses are the schema, YAML files contain the values, and overrides take precedence."""

from mme.config.files import (
    CONFIG_FILE,
    changed_settings,
    differing_keys,
    dump_config,
    flat,
    load_config,
    load_run_config,
    load_saved_config,
    parse_saved_config,
    save_config,
    settings_sha256,
)
from mme.config.rules import validate, validate_world_size, warnings
from mme.config.schema import (
    USER_ID,
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
)
from mme.config.train import TrainConfig

__all__ = [
    "CONFIG_FILE",
    "USER_ID",
    "Config",
    "DataConfig",
    "EvalConfig",
    "KernelsConfig",
    "LossConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "TrainConfig",
    "changed_settings",
    "differing_keys",
    "dump_config",
    "flat",
    "load_config",
    "load_run_config",
    "load_saved_config",
    "parse_saved_config",
    "save_config",
    "settings_sha256",
    "validate",
    "validate_world_size",
    "warnings",
]
