"""How fast is the gated expert FFN, by width and experts, forward and backward, compared with grouped matrix products?

    python -m benchmarks.expert_ffn                                  # default shapes for this device
    python -m benchmarks.expert_ffn --widths 16x64,64x256 --experts 8 --json out.json

The forms are `eager`, three matrix products per expert with hidden rows kept for backward; `grouped`, three calls of
torch._grouped_mm (for widths that are multiples of 8); `torch`, our PyTorch form; and `triton`. Then the whole mixture (top 2) is
measured: `copies` makes the sorted copies and the weighted sum outside the kernel, `routed` gathers and weights inside it.

FLOPs are 6·R·d·f in forward and twice that in backward; recomputation does not count. Bytes are rows and weights, read once, and
their gradients. The bound is the longer of both times at the rates measured in the same run; the share is the bound over the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.agreement import check_same
from benchmarks.roofline import (
    JsonPath,
    Seconds,
    backends,
    device_and_dtype,
    matrix_rate,
    memory_rate,
    publish,
    run_header,
    timed,
)
from kernels import expert_ffn, routed_expert_ffn
from kernels.expert_ffn.routing import sorted_copies, weighted_choices

TOP_K = 2


def main(
    rows: Annotated[int, typer.Option(help="rows, tokens × views; 0: 262144 on a GPU, 16384 on a CPU")] = 0,
    widths: Annotated[str, typer.Option(help="dxf, such as 16x64,64x256")] = "",
    experts: Annotated[str, typer.Option(help="such as 1,8,64")] = "",
    skewed: Annotated[bool, typer.Option(help="half of the rows at one expert")] = False,
    seconds: Seconds = 0.5,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of times and, with --json, writes them."""
    device, dtype = device_and_dtype()
    on_gpu = device.type == "cuda"
    rows = rows or (262144 if on_gpu else 16384)
    asked_widths = (widths or ("16x64,32x128,64x256,128x512,256x1024" if on_gpu else "16x64,50x200")).split(",")
    asked_experts = [int(x) for x in (experts or ("1,8,64" if on_gpu else "1,8")).split(",")]
    rates = {"matrix_tflops": matrix_rate(device, dtype, seconds), "memory_gbs": memory_rate(device, seconds)}
    figures = []
    for width in asked_widths:
        dim, hidden_dim = (int(x) for x in width.split("x"))
        for num_experts in asked_experts:
            figures += measure(rows, num_experts, dim, hidden_dim, skewed, dtype, device, seconds)
    for figure in figures:
        bound_ms = max(figure["gflop"] / rates["matrix_tflops"], 1e3 * figure["gbyte"] / rates["memory_gbs"])
        figure["roofline_share"] = bound_ms / figure["ms"]
    report(figures, device, dtype, rates | {"skewed": skewed}, json_path)


def measure(
    rows: int,
    num_experts: int,
    dim: int,
    hidden_dim: int,
    skewed: bool,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """Measures forward and backward of every form for one shape."""
    random = torch.Generator().manual_seed(rows)
    likes = torch.ones(num_experts)
    likes[0] = max(1, num_experts - 1) if skewed else 1
    top_k = min(TOP_K, num_experts)
    choices = torch.multinomial(likes.expand(rows // top_k, -1), top_k, generator=random).flatten().to(device)
    order = torch.argsort(choices, stable=True)
    offsets = F.pad(torch.bincount(choices, minlength=num_experts).cumsum(0), (1, 0))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=random)).to(device, dtype).requires_grad_()

    x, z = normal(order.numel(), dim), normal(rows // top_k, dim)
    w1, w3 = (normal(num_experts, dim, hidden_dim, scale=dim**-0.5) for _ in range(2))
    w2 = normal(num_experts, hidden_dim, dim, scale=hidden_dim**-0.5)
    weights = torch.rand(rows // top_k, top_k, generator=random).to(device).requires_grad_()
    forms: dict[str, Callable[[], Tensor]] = {"eager": lambda: eager_ffn(x, offsets, w1, w3, w2)}
    if (device.type == "cpu" or dtype == torch.bfloat16) and dim % 8 == hidden_dim % 8 == 0:
        forms["grouped"] = lambda: grouped_ffn(x, offsets.int()[1:], w1, w3, w2)
    for backend in backends(device):
        options: dict[str, Any] = {"backend": backend, "check_offsets": False}
        forms[backend] = functools.partial(expert_ffn, x, offsets, w1, w3, w2, **options)
    mixture: dict[str, Callable[[], Tensor]] = {
        "copies": lambda: weighted_choices(
            expert_ffn(sorted_copies(z, order, top_k), offsets, w1, w3, w2, **options), order, weights
        ),
        "routed": lambda: routed_expert_ffn(z, order, weights, offsets, w1, w3, w2, **options),
    }
    gflop = 6e-9 * order.numel() * dim * hidden_dim
    gbyte = 1e-9 * x.element_size() * (2 * x.numel() + 3 * w1.numel())
    shape: dict[str, Any] = {"rows": order.numel(), "experts": num_experts, "d": dim, "f": hidden_dim}
    results: list[dict[str, Any]] = []
    for inputs, group in (([x, w1, w3, w2], forms), ([z, weights, w1, w3, w2], mixture)):
        reference, *others = group.values()
        for name, form in zip(list(group)[1:], others, strict=True):
            check_agreement(name, form, reference, inputs, 1e-5 if dtype == torch.float32 else 3e-2)
        for name, form in group.items():
            with torch.no_grad():
                forward = timed(form, device, seconds)
            y = form()
            differentiate = functools.partial(torch.autograd.grad, y, inputs, torch.randn_like(y), retain_graph=True)
            backward = timed(differentiate, device, seconds)
            results.append(shape | {"form": name, "pass": "forward", "gflop": gflop, "gbyte": gbyte} | forward)
            counted = {"gflop": 2 * gflop, "gbyte": 2 * gbyte}
            results.append(shape | {"form": name, "pass": "backward"} | counted | backward)
    return results


def eager_ffn(x: Tensor, offsets: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Three products per expert, with PyTorch's autograd."""
    parts = [
        (F.silu(part @ w1[expert]) * (part @ w3[expert])) @ w2[expert]
        for expert, part in enumerate(x.split(offsets.diff().tolist()))
    ]
    return torch.cat(parts)


def grouped_ffn(x: Tensor, ends: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Three grouped products; ``ends`` (E,) int32."""
    hidden = F.silu(torch._grouped_mm(x, w1, offs=ends)) * torch._grouped_mm(x, w3, offs=ends)
    return torch._grouped_mm(hidden, w2, offs=ends)


def check_agreement(
    name: str, form: Callable[[], Tensor], reference: Callable[[], Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    """Raises if a form computes something else, so that only right forms are measured."""
    upstream = torch.randn_like(reference())
    found, expected = ([y.detach(), *torch.autograd.grad(y, inputs, upstream)] for y in (form(), reference()))
    for i, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        what = f"gradient {i}" if i else "result"
        check_same(f"the {what} of the {name} form", value, wanted, tolerance)


def report(
    figures: list[dict[str, Any]], device: torch.device, dtype: torch.dtype, run: dict[str, Any], path: Path | None
) -> None:
    cells = [
        (
            str(row["rows"]),
            str(row["experts"]),
            f"{row['d']} × {row['f']}",
            row["form"],
            row["pass"],
            f"{row['ms']:.2f}",
            f"{row['spread_ms']:.2f}",
            f"{row['gflop']:.2f}",
            f"{row['gbyte']:.2f}",
            f"{row['roofline_share']:.0%}",
        )
        for row in figures
    ]
    columns = ("rows", "experts", "d × f", "form", "pass", "ms", "± ms", "GFLOP", "GB", "of bound")
    publish("Expert FFN", run_header(device, dtype, **run), columns, cells, figures, path)


if __name__ == "__main__":
    typer.run(main)
