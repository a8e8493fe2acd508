"""Loads the training stack on this node and computes with it, in a separate process that preflight starts.

A library built against another version can crash the process without a message. Preflight then still reports which
library was being loaded.
"""

from __future__ import annotations

import importlib
import operator
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.findings import Finding
from launcher.job import gpus

PROJECT = Path(__file__).resolve().parents[1]
OURS = ("mme", "kernels", "launcher")
LIBRARIES = ["torch", "triton", "fbgemm_gpu", "torchrec", "deepspeed", "mme", "kernels"]
REPEATS = 3
SIZE = 1024  # rows and columns of the matrices that are multiplied
# The error of such a product, relative to its largest entry, is about 1e-6 in float32 and 1e-2 in bfloat16. Ten times
# that indicates a fault.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-1}


def main() -> None:
    for name in LIBRARIES:
        _load(name)
    import torch

    _gpus_seen(torch.cuda.device_count()).print_line()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        checks = [table_lookup, matrix_product, *([triton_kernel] if device.type == "cuda" else [])]
        for check in checks:
            try:
                check(device).print_line()
            except Exception as error:  # a broken build may raise anything
                name = check.__name__.replace("_", " ")
                Finding(f"{name} on {device}", "failed", _first_line(error), _REINSTALL).print_line()
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        advice = "install gcc: Triton and torch.compile use it to build their launchers"
        Finding("C compiler", "failed" if len(devices) > 1 else "warning", "none", advice).print_line()


_REINSTALL = "remove .venv and run `make setup`: only the pinned versions of these libraries are built for each other"


def _load(name: str) -> None:
    print(f"loading {name}", flush=True)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken build may raise anything
        Finding(f"load {name}", "failed", _first_line(error), _REINSTALL).print_line()
        raise SystemExit(1) from error
    file = Path(module.__file__ or "")
    if name in OURS and not file.resolve().is_relative_to(PROJECT):
        advice = f"it shadows this project's package: uninstall it, or run in {PROJECT}"
        Finding(
            f"load {name}", "failed", f"a foreign package {name} is imported, from {file.parent}", advice
        ).print_line()
        return
    Finding(f"load {name}", "ok", str(getattr(module, "__version__", "loaded"))).print_line()


def _gpus_seen(seen: int) -> Finding:
    """Whether PyTorch sees the GPUs that the driver lists."""
    import torch

    listed = len(gpus())
    if seen == listed:
        return Finding("GPUs of PyTorch", "ok", f"{seen}, as the driver lists")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    advice = (
        "the driver is too old for this CUDA version, or a GPU has failed: see `nvidia-smi` and the kernel log"
        if torch.version.cuda
        else "this PyTorch is built without CUDA: remove .venv and run `make setup` on this machine"
    )
    found = f"PyTorch {torch.__version__} ({build}) sees {seen} of the {listed} GPUs that the driver lists"
    return Finding("GPUs of PyTorch", "failed", found, advice)


def table_lookup(device: Any) -> Finding:
    """A lookup and an update in an FBGEMM table, which TorchRec builds on: shows that torch and FBGEMM fit together."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_gpu = device.type == "cuda"
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 8, *place)], device=device, optimizer=EmbOptimType.EXACT_SGD, learning_rate=0.5
    )
    (weights,) = table.split_embedding_weights()
    weights.fill_(3.0)
    ids, offsets = torch.tensor([2, 2], device=device), torch.tensor([0, 1, 2], device=device)
    table(ids, offsets).sum().backward()
    found = weights[:, 0].tolist()
    right = found == [3.0, 3.0, 2.0, 3.0]  # two gradients of 1 at a rate of 0.5
    return Finding(
        f"table lookup on {device}",
        "ok" if right else "failed",
        f"rows after an update of one: {found}",
        "" if right else _REINSTALL,
    )


def triton_kernel(device: Any) -> Finding:
    """Compares one Triton kernel with its PyTorch form: shows that Triton works with this GPU and driver."""
    import torch

    from kernels import rms_norm

    x = torch.randn(SIZE, 64, device=device)
    error = float((rms_norm(x, backend="triton") - rms_norm(x, backend="torch")).abs().max())
    right = error < 1e-4
    advice = "" if right else "the kernel's result is wrong: run `make setup`, change the driver, or exclude this GPU"
    return Finding(f"Triton kernel on {device}", "ok" if right else "failed", f"error {error:.1e}", advice)


def matrix_product(device: Any, multiply: Callable[[Any, Any], Any] = operator.matmul) -> Finding:
    """Compares repeated products of one seeded pair of matrices with float64 on the CPU, and with each other."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in range(2))
    reference = left @ right
    errors, times, unsteady = {}, {}, []
    for dtype in (torch.float64, torch.float32, *([torch.bfloat16] if device.type == "cuda" else [])):
        name = str(dtype).removeprefix("torch.")
        a, b = left.to(device, dtype), right.to(device, dtype)
        first = multiply(a, b)
        for _ in range(REPEATS):
            started = time.perf_counter()
            product = multiply(a, b)
            same = torch.equal(product, first)
            times[name] = time.perf_counter() - started
            if not same:
                unsteady.append(name)
        errors[name] = float((product.cpu().double() - reference).abs().max() / reference.abs().max())
    wrong = [name for name, error in errors.items() if not error <= TOLERANCES[name]]
    found = ", ".join(f"{name}: error {error:.1e}, {1e3 * times[name]:.1f} ms" for name, error in errors.items())
    out = "the device is broken: exclude this node from the job and test it (dcgmi diag, memtest)"
    if wrong:
        reason = f"{wrong[0]} is off by more than {TOLERANCES[wrong[0]]:.0e}"
        return Finding(f"matrix product on {device}", "failed", f"{reason}; {found}", out)
    if unsteady:
        reason = f"{unsteady[0]} products of the same matrices differ"
        return Finding(f"matrix product on {device}", "failed", f"{reason}; {found}", out)
    return Finding(f"matrix product on {device}", "ok", found)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
