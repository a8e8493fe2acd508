"""The definition of relative attention, written for reading: dense, differentiable, one sequence at a time.

For position i of a sequence of length L and j ≤ i:

    A_ij = SiLU(q_i·k_j) / N            semantic, per group
    T_ij = w_ts[bucket(τ_{i+1} − τ_j)]  temporal, shared by the groups
    P_ij = w_pos[j − i + N − 1]         positional, shared by the groups
    output_i = concat(Σ_j P_ij v_j, Σ_j T_ij v_j, Σ_j A_ij v_j)

Sources: FuXi-α, arXiv 2502.03036, and its public implementation. All other implementations are tested against this one.

Legend: B sequences, L length of a sequence, N max_seq_len, T tokens, G groups (views × heads).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_TIME_BUCKETS = 129


def time_bucket(seconds: Tensor) -> Tensor:
    """min(floor(ln(max(|Δ|, 1)) / 0.301), 128) for int64 seconds Δ, computed in float32 as in the public FuXi-α code."""
    logarithm = torch.log(torch.abs(seconds).clamp(min=1))
    return (logarithm / 0.301).long().clamp(max=NUM_TIME_BUCKETS - 1)


def relative_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    timestamps: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
) -> Tensor:
    """Arguments and result are those of `kernels.relative_attention`; computes in the dtype of the inputs."""
    outputs = []
    bounds = seq_offsets.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        length = end - start
        times = timestamps[start + b : end + b + 1]
        position = torch.arange(length, device=q.device)
        causal = position[:, None] >= position[None, :]
        keys, values = k[:, start:end], v[:, start:end]
        semantic = F.silu(q[:, start:end] @ keys.transpose(1, 2)) / max_seq_len
        temporal = ts_weights[time_bucket(times[1:, None] - times[None, :-1])]
        positional = pos_weights[position[None, :] - position[:, None] + max_seq_len - 1]
        channels = [(weight * causal).to(v.dtype) @ values for weight in (positional, temporal, semantic)]
        outputs.append(torch.cat(channels, dim=2))
    return torch.cat(outputs, dim=1) if outputs else v.new_empty(v.shape[0], 0, 3 * v.shape[2])
