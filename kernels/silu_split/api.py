"""SiLU of the projection of a FuXi block, split into u, v, q and k as the attention reads them.

    [u, v, q, k] = SiLU(projected);  the heads of each view become groups of v, q and k

Legend: R = M·T rows, M views, T tokens, H heads, G = M·H groups.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import backend_for


def silu_split(
    projected: Tensor, num_views: int, num_heads: int, dv: int, dqk: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q and k of a block.

    Args:
        projected: (R, 4·H·dv + 2·H·dqk) with view-major rows and the columns u (3·H·dv), v (H·dv), q (H·dqk), k (H·dqk).
            float64 (PyTorch form only), float32, bfloat16 or float16.
        backend: ``auto`` (triton on CUDA, torch elsewhere and for float64), ``torch`` or ``triton``.

    Returns:
        u (R, 3·H·dv), v (G, T, dv), q and k (G, T, dqk) with view-major groups; differentiable in ``projected``.

    Raises:
        ValueError: the shape does not fit the widths, a number is below 1, the dtype is not floating, or the backend cannot
            run here. The message names the argument.
    """
    for name, number in {"num_views": num_views, "num_heads": num_heads, "dv": dv, "dqk": dqk}.items():
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    if not projected.is_floating_point():
        raise ValueError(f"projected has dtype {projected.dtype}, expected a floating one")
    widths = [3 * num_heads * dv, num_heads * dv, num_heads * dqk, num_heads * dqk]
    if projected.dim() != 2 or projected.shape[1] != sum(widths) or projected.shape[0] % num_views:
        raise ValueError(
            f"projected has shape {tuple(projected.shape)}, expected ({num_views} views · T, {sum(widths)}) for "
            f"{num_heads} heads of dv {dv} and dqk {dqk}"
        )
    if backend_for(backend, "projected", projected) == "triton":
        # Imported here because the triton package may be missing if this backend is not used.
        from kernels.silu_split.triton_form import silu_split_op

        return silu_split_op(projected, num_views, num_heads, dv, dqk)

    def by_group(x: Tensor) -> Tensor:
        by_head = x.unflatten(0, (num_views, -1)).unflatten(2, (num_heads, -1))
        return by_head.transpose(1, 2).flatten(0, 1)

    u, v, q, k = F.silu(projected).split(widths, dim=1)
    return u, by_group(v), by_group(q), by_group(k)
