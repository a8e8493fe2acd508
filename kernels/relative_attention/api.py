"""The public functions of relative attention, which check their arguments and choose the backend.

Legend: B sequences, N max_seq_len, T tokens, G groups (views × heads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import backend_for, dot_precision, resolve_backend
from kernels.relative_attention.plan import TilePlan, make_tile_plan
from kernels.relative_attention.reference import NUM_TIME_BUCKETS
from kernels.relative_attention.torch_op import TiledAttention, tiled_op
from kernels.relative_attention.work_plan import WorkPlan, wide_sequences


def plan_attention(
    seq_offsets: Tensor, max_seq_len: int, timestamps: Tensor, *, backend: str = "auto"
) -> TilePlan | WorkPlan | None:
    """Computes what depends only on offsets and timestamps, once for all blocks of a decoder, forward and backward.

    Args:
        seq_offsets: (B + 1,) int64, exclusive prefix sum of the lengths, each length at most ``max_seq_len``.
        timestamps: (T + B,) int64 seconds, each sequence with one entry more than its length.
        backend: ``auto``, ``torch`` or ``triton``, as in the calls that use the plan.

    Returns:
        The ``plan`` of `relative_attention`. Under torch.compile it is None for the torch backend, whose operator makes its
        own plan.

    Raises:
        ValueError: an argument is wrong; the message names it. Values are read in one transfer and checked, but not under
            torch.compile.
    """
    chosen = resolve_backend(backend, timestamps.device)
    _check_batch(seq_offsets, max_seq_len, timestamps)
    if torch.compiler.is_compiling():
        return None if chosen == "torch" else WorkPlan(seq_offsets, timestamps, max_seq_len, any_wide=True)
    if chosen == "torch":
        _check_values(seq_offsets, max_seq_len, timestamps)
        return make_tile_plan(seq_offsets, timestamps)
    wide = wide_sequences(seq_offsets, timestamps).any()
    (any_wide,) = _check_values(seq_offsets, max_seq_len, timestamps, wide)
    return WorkPlan(seq_offsets, timestamps, max_seq_len, bool(any_wide))


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    timestamps: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    *,
    backend: str = "auto",
    plan: TilePlan | WorkPlan | None = None,
) -> Tensor:
    """Σ_j of P_ij v_j, T_ij v_j and A_ij v_j over the keys j ≤ i of each sequence (FuXi-α, arXiv 2502.03036).

    A_ij = SiLU(q_i·k_j) / N, T_ij = w_ts[bucket(τ_{i+1} − τ_j)], P_ij = w_pos[j − i + N − 1]; see `reference.py`.
    Worked example: lengths [2, 0, 3] → seq_offsets [0, 2, 2, 5], T = 5, 8 timestamps: 3, 1 and 4 of them.

    Args:
        q, k: (G, T, dqk), G = views × heads. float64, float32, bfloat16 or float16.
        v: (G, T, dv), of q's dtype.
        seq_offsets: (B + 1,) int64, exclusive prefix sum of the lengths.
        max_seq_len: N, at least every length.
        timestamps: (T + B,) int64 seconds: for each sequence those of its tokens, then that of the event to predict.
        ts_weights: (129,), one weight for each time bucket.
        pos_weights: (2N − 1,), w_pos.
        backend: ``auto`` (triton on CUDA, torch elsewhere and for float64), ``torch`` or ``triton``.
        plan: the result of `plan_attention` for these offsets and timestamps; None: computed here.

    Returns:
        (G, T, 3·dv) with the positional, temporal and semantic channel. Differentiable in q, k, v, ts_weights and
        pos_weights.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    chosen = backend_for(backend, "q", q)
    _check_batch(seq_offsets, max_seq_len, timestamps)
    _check_operands(q, k, v, seq_offsets, timestamps, ts_weights, pos_weights, max_seq_len)
    if plan is None:
        plan = plan_attention(seq_offsets, max_seq_len, timestamps, backend=chosen)
    elif plan.num_tokens != q.shape[1]:
        raise ValueError(f"plan is of a batch of {plan.num_tokens} tokens; q has {q.shape[1]}")
    operands = (q, k, v, ts_weights, pos_weights)
    if plan is None:
        return tiled_op(*operands, seq_offsets, timestamps, max_seq_len)
    if (chosen == "torch") != isinstance(plan, TilePlan):
        raise ValueError(f"plan is a {type(plan).__name__}, which is for a backend other than {chosen}")
    if isinstance(plan, TilePlan):
        return TiledAttention.apply(*operands, max_seq_len, plan)
    # Imported here because the triton package may be missing if this backend is not used.
    from kernels.relative_attention.triton_form import LaunchConfig, attention_op

    precision = dot_precision(q.dtype)
    lists = plan.lists(LaunchConfig.choose_block(q.shape[2], v.shape[2], q.itemsize, precision)).tensors()
    return attention_op(*operands, seq_offsets, timestamps, lists, max_seq_len, plan.any_wide, precision)


def _check_batch(seq_offsets: Tensor, max_seq_len: int, timestamps: Tensor) -> None:
    for name, tensor in (("seq_offsets", seq_offsets), ("timestamps", timestamps)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise ValueError(
                f"{name} must be int64 of one dimension, not {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    if seq_offsets.numel() < 1:
        raise ValueError("seq_offsets is empty; B sequences have B + 1 offsets")
    if seq_offsets.device != timestamps.device:
        raise ValueError(f"seq_offsets is on {seq_offsets.device}; timestamps is on {timestamps.device}")
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len ({max_seq_len}) must be at least 1")


def _check_values(seq_offsets: Tensor, max_seq_len: int, timestamps: Tensor, *others: Tensor) -> list[int]:
    """Raises unless the values fit. Returns the values of the scalars ``others``, read in the same transfer."""
    lengths = seq_offsets.diff()
    shortest, longest = (lengths.min(), lengths.max()) if lengths.numel() else (seq_offsets[0], seq_offsets[0])
    values = torch.stack([seq_offsets[0], seq_offsets[-1], shortest, longest, *others]).tolist()
    first, tokens, least, most, *rest = values
    if first != 0:
        raise ValueError(f"seq_offsets must start at 0, not {first}")
    if least < 0:
        raise ValueError("seq_offsets must not decrease")
    if most > max_seq_len:
        raise ValueError(f"seq_offsets has a sequence of {most} tokens; max_seq_len is {max_seq_len}")
    if timestamps.numel() != tokens + lengths.numel():
        raise ValueError(f"timestamps has {timestamps.numel()} entries; T + B is {tokens + lengths.numel()}")
    return rest


def _check_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    timestamps: Tensor,
    ts_weights: Tensor,
    pos_weights: Tensor,
    max_seq_len: int,
) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q must be floating and (G, T, dqk), not {q.dtype} of shape {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; q has {tuple(q.shape)}")
    if v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected ({q.shape[0]}, {q.shape[1]}, dv) as q's")
    if timestamps.numel() != q.shape[1] + seq_offsets.numel() - 1:
        raise ValueError(
            f"timestamps has {timestamps.numel()} entries; T + B is {q.shape[1] + seq_offsets.numel() - 1}"
        )
    if ts_weights.shape != (NUM_TIME_BUCKETS,):
        raise ValueError(f"ts_weights has shape {tuple(ts_weights.shape)}; expected ({NUM_TIME_BUCKETS},)")
    if pos_weights.shape != (2 * max_seq_len - 1,):
        raise ValueError(
            f"pos_weights has shape {tuple(pos_weights.shape)}; expected ({2 * max_seq_len - 1},), 2·max_seq_len − 1"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; q has {q.dtype}")
    weights = {"ts_weights": ts_weights, "pos_weights": pos_weights}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating one")
    others = {"k": k, "v": v, "seq_offsets": seq_offsets, "timestamps": timestamps}
    for name, tensor in (others | weights).items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; q is on {q.device}")
