"""The Triton kernels that a configuration trains with, so that they can be compiled before the first step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kernels.backend import compute_capability, dot_precision, resolve_backend
from kernels.dropout import dropout_steps
from kernels.sampled_softmax.api import TRITON_WIDTH
from mme.config import Config

if TYPE_CHECKING:
    from kernels.variant import Variant

NAMES = {"bfloat16": ("bf16", 2), "float32": ("fp32", 4)}  # Triton's name of a dtype, and bytes
ALL_TOKENS = 1 << 20  # of a batch that shares its negatives as a whole


def compile_training_kernels(config: Config, device: torch.device, processes: int) -> str:
    """Compiles the kernels of a job of ``processes``, many at a time, into the cache of this node; returns a line about it.

    All processes of a node call this, but only the first one compiles; the others load the kernels when they launch them. Without
    a GPU, or with the torch backend, it compiles nothing and returns an empty text.
    """
    if device.type != "cuda" or resolve_backend(config.kernels.backend, device) != "triton":
        return ""
    if int(os.environ.get("LOCAL_RANK", "0")):
        return ""
    from kernels.compilation import fill_cache

    began, arch = time.perf_counter(), compute_capability(device)
    compiled = fill_cache(training_variants(config, arch, processes), arch, os.cpu_count() or 1)
    return f"{compiled} kernels compiled or found in Triton's cache in {time.perf_counter() - began:.0f} s"


def training_variants(config: Config, arch: int, processes: int) -> list[Variant]:
    """The variants that forward and backward of a step launch on a GPU of compute capability ``arch``, in a job of ``processes``.

    They do not include the kernels of histories that span 68 years, and of batches with fewer tokens than one group of shared
    negatives.
    """
    precision = config.train.precision_on("cuda")
    dtype, itemsize = NAMES[precision]
    products = dot_precision(getattr(torch, precision))
    found = [*_loss_variants(config, dtype, itemsize, products)]
    if config.model.block == "fuxi":
        found += _block_variants(config, arch, dtype, itemsize, products, processes)
    return list({(variant.kernel, variant.name, str(variant.constants)): variant for variant in found}.values())


def _block_variants(
    config: Config, arch: int, dtype: str, itemsize: int, products: str, processes: int
) -> Iterator[Variant]:
    from kernels.expert_ffn import variants as experts
    from kernels.expert_ffn.triton_form import WIDEST_BACKWARD
    from kernels.gated_rms_norm import triton_form as norm
    from kernels.relative_attention import variants as attention
    from kernels.silu_split import triton_form as split

    model, moe = config.model, config.model.moe
    (dqk, dv), heads, dim, hidden_dim = model.head_dims, model.num_heads, model.view_dim, model.hidden_dim
    groups = model.num_tables * heads
    yield from attention.shape_variants(arch, dtype, itemsize, products, groups, dqk, dv, wide_times=False)
    yield from split.shape_variants(dtype, heads, dv, dqk)
    dropped = dropout_steps(model.dropout)
    yield from norm.shape_variants(dtype, dim, 0, gated=False)
    yield from norm.shape_variants(dtype, dim, dropped, gated=False)
    yield from norm.shape_variants(dtype, 3 * heads * dv, dropped, gated=True)
    if model.expert_blocks:
        sharing = config.experts_over(processes)
        routed = sharing == 1 and not moe.capacity_factor and dim <= WIDEST_BACKWARD
        sizes = dim, hidden_dim, moe.num_experts // sharing, moe.top_k if routed else 0
        yield from experts.shape_variants(arch, dtype, itemsize, products, *sizes)
    if len(model.expert_blocks) < model.num_blocks:  # dense FFNs
        yield from experts.shape_variants(arch, dtype, itemsize, products, dim, hidden_dim, 1, 0)


def _loss_variants(config: Config, dtype: str, itemsize: int, products: str) -> Iterator[Variant]:
    from kernels.sampled_softmax import variants as softmax

    loss, model = config.loss, config.model
    if loss.is_full_softmax:
        return
    for views in loss.softmax_views(model.num_tables):
        width, group_size = views * model.view_dim, loss.group_size or ALL_TOKENS
        if width > TRITON_WIDTH:
            continue
        yield from softmax.shape_variants(dtype, itemsize, products, width, group_size, bias=loss.log_q_correction)
