"""How fast are the FuXi block's norms and its split SiLU, and which share of the memory bandwidth do they reach?

    python -m benchmarks.elementwise                                # default shapes for this device
    python -m benchmarks.elementwise --rows 8192 --widths 64 --json out.json

The eager form is plain PyTorch under autograd; our PyTorch form and, on a GPU, Triton follow. Bytes are the least that a pass
moves: operands and results once each, the inverse norms, and no mask. The share is the time of these bytes at the copy rate
measured in the same run over the time of the pass; caches make shares above 100% possible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.agreement import check_same
from benchmarks.roofline import JsonPath, Seconds, backends, device_and_dtype, memory_rate, publish, run_header, timed
from kernels import gated_rms_norm, rms_norm, silu_split
from kernels.splitmix import derive

DROPOUT = 0.2
NUM_VIEWS = 4

Form = Callable[[], Sequence[Tensor]]


def main(
    rows: Annotated[str, typer.Option(help="rows, such as 16384,262144, multiples of 4")] = "",
    widths: Annotated[str, typer.Option(help="of a row of the norms and of a head, such as 50,64")] = "",
    seconds: Seconds = 0.3,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of times and, with --json, writes them."""
    device, dtype = device_and_dtype()
    on_gpu = device.type == "cuda"
    asked_rows = [int(x) for x in (rows or ("65536,524288" if on_gpu else "16384")).split(",")]
    asked_widths = [int(x) for x in (widths or ("16,64,192,1024" if on_gpu else "16,50")).split(",")]
    memory_gbs = memory_rate(device, seconds)
    figures = []
    for width in asked_widths:
        for num_rows in asked_rows:
            figures += measure_norms(num_rows, width, dtype, device, seconds)
            if width <= 256:
                figures += measure_silu_split(num_rows, width, dtype, device, seconds)
    for figure in figures:
        figure["memory_share"] = 1e3 * figure["gbyte"] / memory_gbs / figure["ms"]
    report(figures, device, dtype, memory_gbs, json_path)


def measure_norms(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Measures rms_norm, gated_rms_norm, and the latter with dropout, in every form."""
    a, u = (torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    row_bytes, element_bytes = 4 * rows, rows * width * a.element_size()
    measured = []
    for name, inputs, dropout_p in (("norm", [a], 0.0), ("gated", [u, a], 0.0), ("gated, dropout", [u, a], DROPOUT)):
        ours = rms_norm if len(inputs) == 1 else gated_rms_norm
        forms: dict[str, Form] = {"eager": functools.partial(eager_norm, *inputs, dropout_p=dropout_p)}
        keys = derive(torch.arange(rows, device=device), 0) if dropout_p else None
        for backend in backends(device):
            forms[backend] = functools.partial(
                _alone, ours, *inputs, dropout_p=dropout_p, dropout_keys=keys, backend=backend
            )
        if not dropout_p:
            check_agreement(name, forms, inputs, dtype)
        moved = {
            "forward": (len(inputs) + 1) * element_bytes + row_bytes,
            "backward": (2 * len(inputs) + 1) * element_bytes + row_bytes,
        }
        shape = {"operation": name, "rows": rows, "width": width}
        measured += measure_forms(shape, forms, inputs, moved, device, seconds)
    return measured


def measure_silu_split(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Measures one head of dv = dqk = width in every form."""
    projected = torch.randn(rows, 6 * width, device=device, dtype=dtype, requires_grad=True)
    forms: dict[str, Form] = {"eager": functools.partial(eager_silu_split, projected, width)}
    for backend in backends(device):
        forms[backend] = functools.partial(silu_split, projected, NUM_VIEWS, 1, width, width, backend=backend)
    check_agreement("silu_split", forms, [projected], dtype)
    moved_once = projected.numel() * projected.element_size()
    moved = {"forward": 2 * moved_once, "backward": 3 * moved_once}
    shape = {"operation": "silu_split", "rows": rows, "width": width}
    return measure_forms(shape, forms, [projected], moved, device, seconds)


def measure_forms(
    shape: dict[str, Any],
    forms: dict[str, Form],
    inputs: list[Tensor],
    moved: dict[str, int],
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """Measures forward, and backward from a gradient of ones, of each form."""
    measured = []
    for name, form in forms.items():
        with torch.no_grad():
            times = {"forward": timed(form, device, seconds)}
        results = form()
        upstream = [torch.ones_like(x) for x in results]
        backward = functools.partial(torch.autograd.grad, results, inputs, upstream, retain_graph=True)
        times["backward"] = timed(backward, device, seconds)
        for direction, figures in times.items():
            measured.append(shape | {"form": name, "pass": direction, "gbyte": 1e-9 * moved[direction]} | figures)
    return measured


def _alone(operation: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> tuple[Tensor]:
    return (operation(*inputs, **options),)


def eager_norm(*inputs: Tensor, dropout_p: float) -> tuple[Tensor]:
    """Takes the operands of `gated_rms_norm` or of `rms_norm`."""
    y = F.rms_norm(inputs[-1], inputs[-1].shape[1:], eps=1e-6)
    return (F.dropout(inputs[0] * y if len(inputs) == 2 else y, dropout_p),)


def eager_silu_split(projected: Tensor, width: int) -> list[Tensor]:
    u, *others = F.silu(projected).split([3 * width, width, width, width], dim=1)
    return [u, *(x.reshape(NUM_VIEWS, -1, width).contiguous() for x in others)]


def check_agreement(name: str, forms: dict[str, Form], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Raises if a form computes something else, so that only right forms are measured."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = {}
    for label, form in forms.items():
        results = form()
        found[label] = [*results, *torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])]
    for label, values in found.items():
        for value, wanted in zip(values, found["eager"], strict=True):
            check_same(f"{name} of the {label} form", value, wanted, tolerance)


def report(
    figures: list[dict[str, Any]], device: torch.device, dtype: torch.dtype, memory_gbs: float, path: Path | None
) -> None:
    cells = [
        (
            row["operation"],
            str(row["rows"]),
            str(row["width"]),
            row["form"],
            row["pass"],
            f"{row['ms']:.3f}",
            f"{row['spread_ms']:.3f}",
            f"{row['gbyte']:.4f}",
            f"{row['memory_share']:.0%}",
        )
        for row in figures
    ]
    columns = ("operation", "rows", "width", "form", "pass", "ms", "± ms", "GB", "of memory")
    header = run_header(device, dtype, memory_gbs=memory_gbs, dropout=DROPOUT)
    publish("Norms and split SiLU", header, columns, cells, figures, path)


if __name__ == "__main__":
    typer.run(main)
