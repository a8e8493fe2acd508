"""Gated feed-forward networks of E experts over rows sorted by expert.

    y = (SiLU(x W_1) ⊙ (x W_3)) W_2        with the weights of the row's expert

With s = SiLU(x W_1), b = x W_3, h = s ⊙ b and d h = dy W_2ᵀ, the gradients are

    d W_2 = hᵀ dy,  d b = d h ⊙ s,  d a = d h ⊙ b ⊙ SiLU'(x W_1),  d x = d a W_1ᵀ + d b W_3ᵀ,
    d W_1 = xᵀ d a,  d W_3 = xᵀ d b

Backward recomputes x W_1 and x W_3 and needs only x. Keeping the hidden rows would take f / d times as much memory.

Legend: R rows, k choices of a row, d width, E experts, f hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import backend_for
from kernels.expert_ffn.routing import sorted_copies, weighted_choices
from kernels.expert_ffn.torch_form import torch_expert_ffn


def expert_ffn(
    x: Tensor,
    expert_offsets: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    *,
    backend: str = "auto",
    check_offsets: bool = True,
) -> Tensor:
    """Applies the FFN of its expert to each row.

    Args:
        x: (R, d), sorted by expert. float64 (PyTorch form only), float32, bfloat16 or float16.
        expert_offsets: (E + 1,) int64; expert e has the rows [expert_offsets[e], expert_offsets[e + 1]), which may be none.
            Counts [2, 0, 3] → [0, 2, 2, 5].
        w1, w3: (E, d, f). w2: (E, f, d). All have the dtype of ``x``.
        backend: ``auto`` (triton on CUDA, torch elsewhere and for float64), ``torch`` or ``triton``.
        check_offsets: whether to check the values of ``expert_offsets``, which makes the host wait for the GPU. Unchecked
            offsets that do not rise from 0 to R give meaningless results.

    Returns:
        (R, d), differentiable in ``x`` and the weights.

    Raises:
        ValueError: the shape, dtype, device or value of an argument is wrong, and the message names it; or the backend
            cannot run here.
    """
    _check(x, expert_offsets, w1, w3, w2)
    chosen = backend_for(backend, "x", x)
    _check_slots(chosen, x.shape[0])
    if check_offsets and not torch.compiler.is_compiling():
        _check_values(expert_offsets, x.shape[0])
    if chosen == "torch":
        return torch_expert_ffn(x, expert_offsets, w1, w3, w2)
    # Imported here because the triton package may be missing if this backend is not used.
    from kernels.expert_ffn.triton_form import expert_ffn_op

    return expert_ffn_op(x, expert_offsets, w1, w3, w2)


def routed_expert_ffn(
    x: Tensor,
    order: Tensor,
    choice_weights: Tensor,
    expert_offsets: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    *,
    backend: str = "auto",
    check_offsets: bool = True,
) -> Tensor:
    """The weighted sum over the FFNs of the experts that each row chose: a mixture of experts on one device.

    y_r = Σ_j choice_weights[r, j] · FFN_e(r, j)(x_r). The Triton kernels gather the rows and weight the results themselves.
    The PyTorch form, and Triton above a width of 128, copy the rows in sorted order.

    Args:
        x: (R, d).
        order: (R·k,) int64, the choices r·k + j sorted by expert; each occurs once.
        choice_weights: (R, k) float32 or wider.
        expert_offsets: (E + 1,) int64 into ``order``.
        w1, w3, w2, backend: see `expert_ffn`.
        check_offsets: whether to check the values of ``expert_offsets`` and ``order``, see `expert_ffn`.

    Returns:
        (R, d), differentiable in ``x``, ``choice_weights`` and the weights.

    Raises:
        ValueError: see `expert_ffn`.
    """
    _check(x, expert_offsets, w1, w3, w2)
    if choice_weights.dim() != 2 or choice_weights.shape[0] != x.shape[0]:
        raise ValueError(f"choice_weights has shape {tuple(choice_weights.shape)}, expected ({x.shape[0]}, k)")
    if order.shape != (choice_weights.numel(),) or order.dtype != torch.int64:
        raise ValueError(
            f"order must be int64 and ({choice_weights.numel()},), not {order.dtype} of shape {tuple(order.shape)}"
        )
    if not choice_weights.is_floating_point():
        raise ValueError(f"choice_weights has dtype {choice_weights.dtype}, expected a floating one")
    for name, tensor in (("order", order), ("choice_weights", choice_weights)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; x is on {x.device}")
    chosen = backend_for(backend, "x", x)
    _check_slots(chosen, order.numel())
    if check_offsets and not torch.compiler.is_compiling():
        _check_values(expert_offsets, order.numel())
        if not torch.equal(order.sort().values, torch.arange(order.numel(), device=order.device)):
            raise ValueError(f"order must hold each of the {order.numel()} choices once")
    if chosen == "triton":
        from kernels.expert_ffn.triton_form import WIDEST_BACKWARD, routed_expert_ffn_op

        if x.shape[1] <= WIDEST_BACKWARD:
            return routed_expert_ffn_op(x, order, choice_weights.float(), expert_offsets, w1, w3, w2)
    rows = sorted_copies(x, order, choice_weights.shape[1])
    results = expert_ffn(rows, expert_offsets, w1, w3, w2, backend=backend, check_offsets=False)
    return weighted_choices(results, order, choice_weights)


def _check(x: Tensor, expert_offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating and (R, d), not {x.dtype} of shape {tuple(x.shape)}")
    if expert_offsets.dim() != 1 or expert_offsets.numel() < 2 or expert_offsets.dtype != torch.int64:
        raise ValueError(
            f"expert_offsets must be int64 and (E + 1,), not {expert_offsets.dtype} of shape "
            f"{tuple(expert_offsets.shape)}"
        )
    num_experts = expert_offsets.numel() - 1
    if w1.dim() != 3 or w1.shape[:2] != (num_experts, x.shape[1]):
        raise ValueError(
            f"w1 has shape {tuple(w1.shape)}, expected ({num_experts}, {x.shape[-1]}, f) for x and offsets"
        )
    if w3.shape != w1.shape:
        raise ValueError(f"w3 has shape {tuple(w3.shape)}, expected that of w1, {tuple(w1.shape)}")
    if w2.shape != (num_experts, w1.shape[2], x.shape[1]):
        raise ValueError(f"w2 has shape {tuple(w2.shape)}, expected {(num_experts, w1.shape[2], x.shape[1])}")
    weights = {"w1": w1, "w3": w3, "w2": w2}
    for name, weight in weights.items():
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {weight.dtype}; x has {x.dtype}")
    for name, tensor in ({"expert_offsets": expert_offsets} | weights).items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; x is on {x.device}")


def _check_slots(backend: str, slots: int) -> None:
    if backend == "triton" and not torch.compiler.is_compiling() and slots >= 2**31:
        raise ValueError(f"x has {slots} rows or choices; the triton backend takes fewer than 2**31")


def _check_values(expert_offsets: Tensor, num_rows: int) -> None:
    least = expert_offsets.diff().min()
    first, last, step = torch.stack([expert_offsets[0], expert_offsets[-1], least]).tolist()
    if first != 0 or last != num_rows:
        raise ValueError(f"expert_offsets runs from {first} to {last}; expected from 0 to the {num_rows} rows")
    if step < 0:
        raise ValueError("expert_offsets must not decrease")
