"""FLOPs of the model, counted in one place for load balancing, predictions and utilisation.

The counts include the multiply-adds of the matrix products in the definition, over the true jagged lengths. They exclude
padding, masked pairs and recomputation in backward. A multiply-add is two FLOPs; backward has twice as many as forward.

Legend: N max_seq_len, M views, D total width, d view width, H heads, E experts, k top_k, f hidden width, n negatives.
"""

from __future__ import annotations

from mme.config import Config, ModelConfig


def head_widths(model: ModelConfig) -> tuple[int, int]:
    """H·dqk and H·dv."""
    dqk, dv = model.head_dims
    return model.num_heads * dqk, model.num_heads * dv


def projections(model: ModelConfig) -> int:
    """Multiply-adds of the projections of a FuXi block, for one token and view: d (4 H dv + 2 H dqk) + 3 H dv d."""
    qk, v = head_widths(model)
    return model.view_dim * (4 * v + 2 * qk) + 3 * v * model.view_dim


def attention_pair(model: ModelConfig) -> int:
    """Multiply-adds of a FuXi block for one query-key pair and view: the score and three channels of the value."""
    qk, v = head_widths(model)
    return qk + 3 * v


def expert_row(model: ModelConfig) -> int:
    """Multiply-adds of one expert, or of the dense FFN, for a row."""
    return 3 * model.view_dim * model.hidden_dim


def training_flops(config: Config, num_tokens: int, num_pairs: int, num_items: int) -> dict[str, int]:
    """FLOPs of one training step by part, forward and backward, for FuXi blocks.

    Args:
        num_tokens: T.
        num_pairs: query-key pairs, Σ L (L + 1) / 2 over the sequences.
        num_items: items of the catalogue, which the full softmax scores.
    """
    model, loss = config.model, config.loss
    blocks, with_experts, top_k = model.num_blocks, len(model.expert_blocks), model.moe.top_k
    rows = model.num_tables * num_tokens
    forward = {
        "attention": blocks * (rows * projections(model) + model.num_tables * num_pairs * attention_pair(model)),
        "routing": with_experts * rows * model.router_views * model.view_dim * model.moe.num_experts,
        "experts": (with_experts * top_k + blocks - with_experts) * rows * expert_row(model),
        "loss": loss.num_passes * num_tokens * loss.num_scored(num_items) * model.embedding_dim,
    }
    return {part: 3 * 2 * count for part, count in forward.items()}
