"""The public function of sampled softmax, which checks its arguments and chooses the backend.

With unit vectors h_t and e_i, temperature τ, offset o and bias b_i of an item, the logits, loss and gradients of token t are

    z_t0 = ⟨h_t, e_target⟩ / τ,    z_tj = ⟨h_t, e_neg(t,j)⟩ / τ + o + b_neg(t,j)  (−5e4 if the negative is the target)
    loss_t = ln Σ_j exp z_tj − z_t0

    d h_t = Σ_j g_tj e_j,    d e_i = Σ g_tj h_t over all (t, j) whose item is i,    g = (softmax(z) − 1[j = 0]) · grad / τ

Token t uses the negatives of group t // group_size.

Legend: T tokens, D width, U distinct items, n negatives, g group_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import backend_for
from kernels.sampled_softmax.torch_form import own_negatives, shared_negatives

TRITON_WIDTH = 512  # a program holds whole rows of accumulators


def sampled_softmax_loss(
    hidden: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    group_size: int = 1,
    temperature: float = 0.05,
    logit_offset: float = 0.0,
    item_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The loss of each token.

    Args:
        hidden: (T, D), normalised by the caller; float64, float32, bfloat16 or float16.
        items: (U, D), normalised by the caller, of the same dtype.
        targets: (T,) int64 rows of ``items``.
        negatives: (ceil(T / group_size), n) int64 rows of ``items``; token t uses row t // group_size. Only on a CPU is it
            checked that the rows exist, because reading them from a GPU would wait for it.
        group_size: number of consecutive tokens that share their negatives; 0: all tokens share one row.
        temperature: τ.
        logit_offset: added to the logits of the negatives.
        item_bias: (U,) float32, added to the logit of each negative, such as −log of its expected count among the negatives.
            It gets no gradient. None: nothing is added.
        backend: ``auto`` (triton on CUDA for inputs that it takes, torch otherwise), ``torch``, or ``triton``, which takes
            float32, bfloat16 and float16 and widths up to 512.

    Returns:
        (T,) float32 (float64 for float64 input), differentiable in ``hidden`` and ``items``.

    Raises:
        ValueError: an argument is wrong, or the backend cannot run here. The message names it.
    """
    chosen = backend_for(backend, "hidden", hidden)
    _check_operands(hidden, items, targets, negatives, item_bias, group_size)
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be above 0")
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_rows(items.shape[0], targets=targets, negatives=negatives)
    if hidden.shape[1] > TRITON_WIDTH and backend == "triton":
        raise ValueError(f"hidden has width {hidden.shape[1]}; the triton backend takes widths up to {TRITON_WIDTH}")
    if chosen == "triton" and hidden.shape[1] <= TRITON_WIDTH:
        # Imported here because the triton package may be missing if this backend is not used.
        from kernels.sampled_softmax.triton_form import loss_op

        loss, _ = loss_op(hidden, items, targets, negatives, item_bias, group_size, temperature, logit_offset)
        return loss
    size = group_size or max(1, hidden.shape[0])
    if size == 1:
        return own_negatives(hidden, items, targets, negatives, item_bias, temperature, logit_offset)[0]
    return shared_negatives(hidden, items, targets, negatives, item_bias, size, temperature, logit_offset)[0]


def _check_operands(
    hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, item_bias: Tensor | None, group_size: int
) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating and (T, D), not {hidden.dtype} of shape {tuple(hidden.shape)}")
    if items.dim() != 2 or items.shape[1] != hidden.shape[1]:
        raise ValueError(f"items has shape {tuple(items.shape)}, expected (U, {hidden.shape[1]}) as hidden's")
    if items.dtype != hidden.dtype:
        raise ValueError(f"items has dtype {items.dtype}; hidden has {hidden.dtype}")
    if group_size < 0:
        raise ValueError(f"group_size ({group_size}) must not be negative; 0 means one group")
    num_tokens = hidden.shape[0]
    size = group_size or max(1, num_tokens)
    if targets.shape != (num_tokens,):
        raise ValueError(f"targets has shape {tuple(targets.shape)}, expected ({num_tokens},)")
    groups = -(-num_tokens // size)
    if negatives.dim() != 2 or negatives.shape[0] != groups:
        raise ValueError(
            f"negatives has shape {tuple(negatives.shape)}, expected ({groups}, n) for {num_tokens} tokens in groups "
            f"of {size}"
        )
    for name, tensor in (("targets", targets), ("negatives", negatives)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.int64")
    if item_bias is not None and (item_bias.shape != items.shape[:1] or item_bias.dtype != torch.float32):
        raise ValueError(
            f"item_bias has shape {tuple(item_bias.shape)} and dtype {item_bias.dtype}, expected ({items.shape[0]},) and "
            "torch.float32"
        )
    operands = {"items": items, "targets": targets, "negatives": negatives, "item_bias": item_bias}
    for name, operand in operands.items():
        if operand is not None and operand.device != hidden.device:
            raise ValueError(f"{name} is on {operand.device}; hidden is on {hidden.device}")


def _check_rows(num_items: int, **named: Tensor) -> None:
    for name, rows in named.items():
        if rows.numel():
            least, most = (int(bound) for bound in rows.aminmax())
            if least < 0 or most >= num_items:
                raise ValueError(f"{name} names rows from {least} to {most}; items has {num_items}")
