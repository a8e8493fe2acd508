"""Loads the training stack of this node and calculates with it; a process of its own, started by preflight.

A library that was built against another one can end the process without a word: preflight survives that, and says what
was being loaded.
"""

from __future__ import annotations

import importlib
import shutil
import time
from typing import Any

from launcher.findings import Finding

LIBRARIES = ["torch", "triton", "fbgemm_gpu", "torchrec", "deepspeed", "mme", "kernels"]
SIZE = 1024  # of the square matrices that are multiplied
# A float32 product of such matrices is off by about 1e-6 of its largest entry, bfloat16 by 1e-2: ten times that is a fault.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-1}


def main() -> None:
    for name in LIBRARIES:
        _load(name)
    import torch

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        for check in (_fbgemm_operator, _matrix_product):
            try:
                check(device).print_line()
            except Exception as error:  # whatever a broken build raises
                name = check.__name__.strip("_").replace("_", " ")
                Finding(f"{name} on {device}", "failed", _first_line(error), _REINSTALL).print_line()
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        advice = "install gcc: Triton and torch.compile build their launchers with it"
        Finding("C compiler", "failed" if len(devices) > 1 else "warning", "none", advice).print_line()


_REINSTALL = "remove .venv and run `make setup`: these libraries must be of the pinned versions, built for each other"


def _load(name: str) -> None:
    print(f"loading {name}", flush=True)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a broken build raises
        Finding(f"load {name}", "failed", _first_line(error), _REINSTALL).print_line()
        raise SystemExit(1) from error
    Finding(f"load {name}", "ok", str(getattr(module, "__version__", "loaded"))).print_line()


def _fbgemm_operator(device: Any) -> Finding:
    import torch

    sums = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 3], device=device)).tolist()
    right = sums == [0, 2, 2, 5]
    return Finding(
        f"fbgemm operator on {device}",
        "ok" if right else "failed",
        f"offsets of lengths [2, 0, 3]: {sums}",
        "" if right else _REINSTALL,
    )


def _matrix_product(device: Any) -> Finding:
    """Products of one seeded pair of matrices on the device, against float64 on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in range(2))
    reference = left @ right
    errors, times = {}, {}
    for dtype in (torch.float64, torch.float32, *([torch.bfloat16] if device.type == "cuda" else [])):
        a, b = left.to(device, dtype), right.to(device, dtype)
        (a @ b).sum().item()
        started = time.perf_counter()
        product = a @ b
        product.sum().item()
        name = str(dtype).removeprefix("torch.")
        times[name] = time.perf_counter() - started
        errors[name] = float((product.cpu().double() - reference).abs().max() / reference.abs().max())
    wrong = [name for name, error in errors.items() if not error <= TOLERANCES[name]]
    found = ", ".join(f"{name}: error {error:.1e}, {1e3 * times[name]:.1f} ms" for name, error in errors.items())
    advice = (
        f"{wrong[0]} is off by more than {TOLERANCES[wrong[0]]:.0e}: take this node out of the job" if wrong else ""
    )
    return Finding(f"matrix product on {device}", "failed" if wrong else "ok", found, advice)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
