"""The kernels that the suite launches, by operation, so that they can be compiled together before it measures."""

from __future__ import annotations

from kernels.expert_ffn import variants as experts
from kernels.expert_ffn.triton_form import WIDEST_BACKWARD
from kernels.gated_rms_norm import triton_form as norm
from kernels.relative_attention import variants as attention
from kernels.sampled_softmax import variants as softmax
from kernels.silu_split import triton_form as split
from kernels.variant import Variant
from mme.config import Config
from mme.model.kernel_variants import training_variants

BFLOAT16 = ("bf16", 2, "ieee")


def variants(arch: int, config: Config, dry: bool) -> dict[str, list[Variant]]:
    """The variants by operation. A dry run has only two, of the norms."""
    if dry:
        return {"norms": norm.shape_variants("bf16", 16, 0, gated=False)}
    widths = ((1, 64), (2, 128), (4, 16))
    expert_shapes = ((64, 256, 8), (128, 512, 8), (256, 1024, 8), (64, 256, 64))
    return {
        "attention": [
            variant
            for groups, width in widths
            for variant in attention.shape_variants(arch, *BFLOAT16, groups, width, width, wide_times=False)
        ],
        "training": training_variants(config, arch, 1),
        "experts": [
            variant
            for dim, hidden_dim, num_experts in expert_shapes
            for top_k in ((0, 2) if dim <= WIDEST_BACKWARD else (0,))
            for variant in experts.shape_variants(arch, *BFLOAT16, dim, hidden_dim, num_experts, top_k)
        ],
        "softmax": [
            variant
            for group_size in (1, 64)
            for variant in softmax.shape_variants(*BFLOAT16, 64, group_size, bias=False)
        ],
        "elementwise": [
            *(
                variant
                for width in (64, 192)
                for dropped, gated in ((0, False), (0, True), (13_107, True))
                for variant in norm.shape_variants("bf16", width, dropped, gated)
            ),
            *split.shape_variants("bf16", 1, 64, 64),
        ],
    }
