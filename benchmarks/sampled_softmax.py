"""How fast is the sampled-softmax loss, by tokens and kind of negatives, forward and backward, and how much memory does it take?

    python -m benchmarks.sampled_softmax                                # default shapes for this device
    python -m benchmarks.sampled_softmax --tokens 8192 --negatives 1x128,64x128 --json out.json

The eager form gathers the negatives' rows and keeps their logits, as public training code does; our PyTorch form and, on a GPU,
Triton follow. FLOPs are 2·T·(n + 1)·D in forward and twice that in backward; recomputation does not count. Bytes are those of the
rows that each token (own negatives) or each group (shared negatives) reads, twice in backward, and of the gradients. The bound is
the longer of both times at the rates measured in the same run; the share is the bound over the time. Caches make shares above
100% possible.
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
    step_memory,
    timed,
)
from kernels import sampled_softmax_loss
from kernels.sampled_softmax.torch_form import MASKED_LOGIT

TEMPERATURE = 0.05
MEMORY_LIMIT_BYTES = 24 << 30  # the eager form is skipped if its gathered rows and their gradient exceed this


def main(
    tokens: Annotated[str, typer.Option(help="tokens of a batch, such as 4096,65536")] = "",
    negatives: Annotated[
        str, typer.Option(help="GROUPxCOUNT, such as 1x128,64x128; group 0: all tokens share")
    ] = "1x128,64x128,0x512",
    widths: Annotated[str, typer.Option(help="such as 50,64")] = "",
    items: Annotated[int, typer.Option(help="distinct items of the batch")] = 20000,
    seconds: Seconds = 0.5,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of times and, with --json, writes them."""
    device, dtype = device_and_dtype()
    on_gpu = device.type == "cuda"
    asked_tokens = [int(x) for x in (tokens or ("8192,32768,131072" if on_gpu else "4096")).split(",")]
    asked_negatives = [x.split("x") for x in negatives.split(",")]
    asked_widths = [int(x) for x in (widths or ("64,256" if on_gpu else "50")).split(",")]
    rates = {"matrix_tflops": matrix_rate(device, dtype, seconds), "memory_gbs": memory_rate(device, seconds)}
    rows = []
    for width in asked_widths:
        for group, count in asked_negatives:
            for num_tokens in asked_tokens:
                rows += measure(num_tokens, int(group), int(count), width, items, dtype, device, seconds)
    for row in rows:
        bound_ms = max(row["gflop"] / rates["matrix_tflops"], 1e3 * row["gbyte"] / rates["memory_gbs"])
        row["roofline_share"] = bound_ms / row["ms"]
    report(rows, device, dtype, rates, json_path)


def measure(
    tokens: int,
    group_size: int,
    count: int,
    width: int,
    num_items: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[dict[str, Any]]:
    """Measures forward and backward of every form for one shape."""
    random = torch.Generator().manual_seed(tokens)
    size = group_size or tokens
    groups = -(-tokens // size)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=random)).to(device, dtype).requires_grad_()

    hidden, items = unit(tokens), unit(num_items)
    targets = torch.randint(num_items, (tokens,), generator=random).to(device)
    negatives = torch.randint(num_items, (groups, count), generator=random).to(device)
    loss = functools.partial(
        sampled_softmax_loss, hidden, items, targets, negatives, group_size=group_size, temperature=TEMPERATURE
    )
    forms: dict[str, Callable[[], Tensor]] = {
        backend: functools.partial(loss, backend=backend) for backend in backends(device)
    }
    if 2 * groups * count * width * hidden.element_size() + 12 * tokens * count <= MEMORY_LIMIT_BYTES:
        eager = functools.partial(eager_loss, hidden, items, targets, negatives, size)
        for name, form in forms.items():
            check_agreement(name, form, eager, [hidden, items], 1e-5 if dtype == torch.float32 else 2e-2)
        forms = {"eager": eager, **forms}
    rows_read = tokens * (1 + 1 + count) if size == 1 else 2 * tokens + groups * count
    row_bytes = width * hidden.element_size()
    gflop = 2e-9 * tokens * (count + 1) * width
    counted = {
        "forward": {"gflop": gflop, "gbyte": 1e-9 * rows_read * row_bytes},
        "backward": {"gflop": 2 * gflop, "gbyte": 1e-9 * (2 * rows_read + tokens + num_items) * row_bytes},
    }
    shape: dict[str, Any] = {
        "tokens": tokens,
        "group": group_size,
        "negatives": count,
        "width": width,
        "items": num_items,
    }
    rows = []
    for name, form in forms.items():
        with torch.no_grad():
            figures = {"forward": timed(form, device, seconds)}
        value = form().mean()
        backward = functools.partial(torch.autograd.grad, value, [hidden, items], retain_graph=True)
        figures["backward"] = timed(backward, device, seconds)
        for direction, measured in figures.items():
            rows.append(shape | {"form": name, "pass": direction} | counted[direction] | measured)
        rows[-1]["step_mem_gib"] = step_memory(form, [hidden, items], device)
    return rows


def check_agreement(
    name: str, form: Callable[[], Tensor], eager: Callable[[], Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    """Raises if a form computes something else, so that only right forms are measured."""
    found, expected = ([y, *torch.autograd.grad(y.mean(), inputs)] for y in (form(), eager()))
    for what, value, wanted in zip(("loss", "d hidden", "d items"), found, expected, strict=True):
        check_same(f"{what} of the {name} form", value, wanted, tolerance)


def eager_loss(hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, size: int) -> Tensor:
    """Gathered rows (groups, n, D), logits (T, 1 + n), cross-entropy."""
    groups = negatives.shape[0]
    grouped = F.pad(hidden, (0, 0, 0, groups * size - len(hidden))).unflatten(0, (groups, size))
    positive = (hidden * items[targets]).sum(1, keepdim=True)
    negative = torch.bmm(grouped, items[negatives].transpose(1, 2)).flatten(0, 1)[: len(hidden)]
    same = negatives.repeat_interleave(size, 0)[: len(hidden)] == targets[:, None]
    logits = torch.cat([positive, negative], 1).float() / TEMPERATURE
    logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, MASKED_LOGIT)], 1)
    return F.cross_entropy(logits, torch.zeros_like(targets), reduction="none")


def report(
    rows: list[dict[str, Any]], device: torch.device, dtype: torch.dtype, rates: dict[str, float], path: Path | None
) -> None:
    cells = [
        (
            str(row["tokens"]),
            f"{row['group']} × {row['negatives']}",
            str(row["width"]),
            row["form"],
            row["pass"],
            f"{row['ms']:.2f}",
            f"{row['spread_ms']:.2f}",
            f"{row['gflop']:.2f}",
            f"{row['gbyte']:.2f}",
            f"{row['roofline_share']:.0%}",
            f"{row['step_mem_gib']:.3f}" if "step_mem_gib" in row else "",
        )
        for row in rows
    ]
    columns = ("tokens", "group × n", "width", "form", "pass", "ms", "± ms", "GFLOP", "GB", "of bound", "step GiB")
    publish("Sampled softmax", run_header(device, dtype, **rates), columns, cells, rows, path)


if __name__ == "__main__":
    typer.run(main)
