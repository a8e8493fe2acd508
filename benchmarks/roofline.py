"""Measures the highest rates of this device in matrix products and memory traffic, and the time of a call.

python -m benchmarks.roofline
"""

from __future__ import annotations

import ctypes
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.json_file import write_json
from kernels.backend import interpreting, triton_installed

# Options that several benchmarks have.
Seconds = Annotated[float, typer.Option(help="time spent on each figure")]
JsonPath = Annotated[Optional[Path], typer.Option("--json", help="file to write the figures to")]  # noqa: UP045


def timed(run: Callable[[], Any], device: torch.device, seconds: float) -> dict[str, float]:
    """Median and spread (half the interquartile range) of one call, after a warm-up; on a GPU also its memory.

    On a GPU the time is that between two events on its stream, and the second-level cache is overwritten before each call.
    """
    on_gpu = device.type == "cuda"
    measure = functools.partial(_milliseconds_on_gpu if on_gpu else _milliseconds_on_cpu, run)
    measure()
    times: list[float] = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    end = time.perf_counter() + seconds
    while len(times) < (5 if seconds else 2) or time.perf_counter() < end:
        times.append(measure())
    low, median, high = statistics.quantiles(times, n=4)
    figures = {"ms": median, "spread_ms": (high - low) / 2}
    if on_gpu:
        figures["peak_mem_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return figures


def _milliseconds_on_cpu(run: Callable[[], Any]) -> float:
    # For one thread the CPU time counts, because it excludes other processes on the core.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return 1e3 * (clock() - start)


def _milliseconds_on_gpu(run: Callable[[], Any]) -> float:
    flush_cache()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def flush_cache() -> None:
    """Overwrites more memory than the second-level cache of the current GPU holds."""
    _cache_filler().zero_()


@functools.cache
def _cache_filler() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """GiB that ``run`` takes at its peak beyond the memory in use before it; on a CPU, the growth of the resident set."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    # What earlier calls gave back may be with the allocator still: it would serve `run` unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident set to the current one
    before = _resident_kib("VmRSS")
    run()
    return max(0, _resident_kib("VmHWM") - before) / 2**20


def step_memory(form: Callable[[], Tensor], inputs: list[Tensor], device: torch.device) -> float:
    """GiB that forward and backward together take at their peak beyond the inputs: what is kept for backward included."""
    return peak_memory(lambda: torch.autograd.grad(form().float().mean(), inputs), device)


def _resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The GPU and bfloat16, or without a GPU the CPU and float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def backends(device: torch.device) -> list[str]:
    """The backends to compare on ``device``; Triton's interpreter is among them if TRITON_INTERPRET=1."""
    return ["torch", "triton"] if interpreting() or (device.type == "cuda" and triton_installed()) else ["torch"]


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """TFLOP/s (GFLOP per millisecond) of one large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2e-9 * size**3 / timed(lambda: a @ a, device, seconds)["ms"]


def memory_rate(device: torch.device, seconds: float) -> float:
    """GB/s of one large copy, counting reads and writes."""
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-6 * source.numel() / timed(lambda: target.copy_(source), device, seconds)["ms"]


def run_header(device: torch.device, dtype: torch.dtype, **figures: Any) -> dict[str, Any]:
    """The conditions of a result: device, threads, version and dtype, followed by ``figures``."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        **figures,
    }


def publish(
    what: str, header: dict[str, Any], columns: Sequence[str], cells: Iterable[Sequence[str]],
    rows: list[dict[str, Any]], path: Path | None,
) -> None:  # fmt: skip
    """Prints ``cells`` as a table, with the device and the rates that it reached as title, and writes ``rows`` as JSON."""
    rates = {"matrix_tflops": "matrices at {:.3g} TFLOP/s", "memory_gbs": "memory at {:.3g} GB/s"}
    reached = [text.format(header[name]) for name, text in rates.items() if name in header]
    table = Table(title=f"{what} on {', '.join([header['device'], header['dtype'], *reached])}")
    for column in columns:
        table.add_column(column, justify="left" if column in ("operation", "form", "pass") else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=120).print(table)
    if path is not None:
        write_json(path, header | {"rows": rows})


def main() -> None:
    """Prints both rates. Each benchmark measures them again in its own run."""
    device, _ = device_and_dtype()
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        print(f"{dtype} matrix products on {device}: {matrix_rate(device, dtype, 0.5):.3g} TFLOP/s")
    print(f"memory on {device}: {memory_rate(device, 0.5):.3g} GB/s read and written")


if __name__ == "__main__":
    main()
