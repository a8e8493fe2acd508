"""RMS normalisation with an optional gate and dropout.

    y = dropout(u ⊙ a / √(mean(a²) + ε))        rms_norm: u = 1

With r = 1 / √(mean(a²) + ε), â = a r and g the gradient after the dropout mask, the gradients are

    d u = g ⊙ â,    d a = r (g ⊙ u − â mean(g ⊙ u ⊙ â))

Legend: R rows, w width.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backend import backend_for
from kernels.dropout import checked_keys, dropout_steps
from kernels.gated_rms_norm.torch_form import torch_norm

EPS = 1e-6


def gated_rms_norm(
    u: Tensor,
    a: Tensor,
    *,
    eps: float = EPS,
    dropout_p: float = 0.0,
    dropout_keys: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(u ⊙ RMSNorm(a)), without a learned scale.

    Args:
        u, a: (R, w) of the same dtype: float64 (PyTorch form only), float32, bfloat16 or float16.
        dropout_p: probability of zero, in steps of 2⁻¹⁶; other elements are divided by 1 − p. 0: no dropout.
        dropout_keys: (R,) int64, a random key for each row (`kernels.splitmix`). The key determines the row's dropout mask,
            which is the same on both backends. Required with dropout.
        backend: ``auto`` (triton on CUDA, torch elsewhere and for float64), ``torch`` or ``triton``.

    Returns:
        (R, w), differentiable in ``u`` and ``a``.

    Raises:
        ValueError: shapes, dtypes or devices differ, ``eps`` is negative, ``dropout_p`` is outside [0, 1), ``dropout_keys``
            are missing or do not fit, or the backend cannot run here. The message names the argument.
    """
    if u.shape != a.shape or a.dim() != 2:
        raise ValueError(f"u {tuple(u.shape)} and a {tuple(a.shape)} must have one shape (R, w)")
    if u.dtype != a.dtype:
        raise ValueError(f"u has dtype {u.dtype}; a has {a.dtype}")
    if u.device != a.device:
        raise ValueError(f"u is on {u.device}; a is on {a.device}")
    return _norm("a", a, u, eps, dropout_p, dropout_keys, backend)


def rms_norm(
    x: Tensor,
    *,
    eps: float = EPS,
    dropout_p: float = 0.0,
    dropout_keys: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(RMSNorm(x)) for x (R, w), without a learned scale; arguments and errors are those of `gated_rms_norm`."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (R, w)")
    return _norm("x", x, None, eps, dropout_p, dropout_keys, backend)


def _norm(
    name: str, a: Tensor, u: Tensor | None, eps: float, dropout_p: float, dropout_keys: Tensor | None, backend: str
) -> Tensor:
    if not a.is_floating_point():
        raise ValueError(f"{name} has dtype {a.dtype}, expected a floating one")
    if not eps >= 0:
        raise ValueError(f"eps ({eps}) must not be negative")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p ({dropout_p}) must be at least 0 and below 1")
    dropped = dropout_steps(dropout_p)
    keys = checked_keys(dropout_keys, a) if dropped else None
    if backend_for(backend, name, a) == "torch":
        return torch_norm(a, u, keys, eps, dropped)
    # Imported here because the triton package may be missing if this backend is not used.
    from kernels.gated_rms_norm.triton_form import norm_op

    return norm_op(a, u, keys, eps, dropped)[0]
