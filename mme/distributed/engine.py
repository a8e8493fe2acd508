"""The decoder under DeepSpeed: ZeRO partitions the optimizer states, and gradients are averaged over the ranks."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from mme.config import Config

ADAM_STATES = ("exp_avg", "exp_avg_sq")
# Gradients are averaged over the ranks as soon as they fill a bucket, while backward goes on: 32 MiB in float32.
BUCKET_ELEMENTS = 2**23


def initialize_engine(decoder: nn.Module, config: Config) -> Any:
    """Wraps ``decoder`` in a DeepSpeed engine with AdamW."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    train = config.train
    named = [(name, parameter) for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    decays = [decay_applies(train.weight_decay_on, name, parameter) for name, parameter in named]
    decayed = {"params": [p for p, decay in zip(parameters, decays, strict=True) if decay], "name": "decoder"}
    others = {"params": [p for p, decay in zip(parameters, decays, strict=True) if not decay], "name": "undecayed"}
    by_decay = [decayed, {**others, "weight_decay": 0.0}] if others["params"] else [decayed]
    groups = split_params_into_different_moe_groups_for_optimizer(by_decay)
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
    )
    num_elements = sum(parameter.numel() for parameter in parameters)
    engine, *_ = deepspeed.initialize(
        model=decoder,
        optimizer=optimizer,
        config={
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1; ours is in `clipping.py`
            "train_micro_batch_size_per_gpu": 1,  # the engine needs a number; our batches are jagged
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": config.parallel.zero_stage,
                # A step checks and clips the gradients itself, in an exchange that it has anyway (`mme.step`).
                "compute_grad_norm": False,
                # The default buffers take gigabytes for models of any size.
                "overlap_comm": num_elements > BUCKET_ELEMENTS,
                "reduce_bucket_size": min(num_elements, BUCKET_ELEMENTS),
                "allgather_bucket_size": num_elements,
            },
        },
    )
    _make_optimizer_states(engine)
    return engine


def decay_applies(weight_decay_on: str, name: str, parameter: Tensor) -> bool:
    """Whether `train.weight_decay` applies to a parameter of the decoder."""
    return weight_decay_on == "all" or (parameter.ndim > 1 and name != "inputs.positions")


def _make_optimizer_states(engine: Any) -> None:
    """Makes Adam's states before the first step, so that a checkpoint can be loaded into them."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for partition in group["params"]:
            moments = {name: torch.zeros_like(partition) for name in ADAM_STATES}
            optimizer.state[partition] = {"step": torch.zeros(()), **moments}
    engine.optimizer._lazy_init_hp_params_optimizer_state()  # links each parameter to its part of the states


def set_optimizer_step(engine: Any, step: int) -> None:
    """Sets Adam's count of steps, on which its bias correction depends."""
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def reduced_gradients(engine: Any) -> list[Tensor]:
    """This rank's part of the decoder's gradients, averaged over the ranks, between backward and step."""
    return [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group or ()]


def skip_step(engine: Any) -> None:
    """Drops the gradients between backward and step, and DeepSpeed's records of them; a collective.

    DeepSpeed does so for gradients that are not finite, if it is told to look for them.
    """
    for gradient in reduced_gradients(engine):
        gradient.fill_(torch.nan)
    engine.optimizer.check_grad_overflow = True
    engine.step()
    engine.optimizer.check_grad_overflow = False
    assert engine.optimizer.overflow
