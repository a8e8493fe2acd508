"""How fast are the kernels and the training on this GPU? One run of eight minutes measures all figures.

    OUT=benchmarks/raw/h100 python -m benchmarks.gpu_suite
    python -m benchmarks.gpu_suite --dry --out /tmp/dry     # every stage on a CPU, with tiny shapes

Stages run in order of importance, each in a separate process with its own time limit, so a stage that fails or takes too long does
not affect others. Every figure is written to ``results.jsonl`` as soon as it is known (`benchmarks.gpu_suite.results`); the output
of stages is in ``logs/``. The same command, run again, measures what is missing. Nothing is installed or downloaded; a figure whose
packages are missing is recorded as failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from benchmarks.gpu_suite.results import DEVICE_LOST, Results

# Time limits in seconds, including start-up. On an H100 or H200 a stage should take half of its limit.
STAGES = {
    "environment": 25,
    "compile": 100,
    "rates": 30,
    "correctness": 75,
    "attention": 60,
    "training": 110,
    "lengths": 45,
    "experts": 40,
    "softmax": 30,
    "elementwise": 25,
    "padded": 25,
    "flex": 35,
}
TOTAL_S = 465.0
LEAST_S = 8.0  # a stage does not start with less time left
DRY_FACTOR = 8  # multiplies all limits, because imports take many seconds on a busy CPU


def main(
    out: Annotated[Optional[Path], typer.Option(help="Folder of the results. Default: $OUT.")] = None,  # noqa: UP045
    only: Annotated[str, typer.Option(help=f"Run only some of {', '.join(STAGES)}, separated by commas.")] = "",
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help=f"Limit for all stages together. Default: {TOTAL_S:.0f}, or {DRY_FACTOR} times that in a dry run."
        ),
    ] = None,
    dry: Annotated[bool, typer.Option(help="Run on a CPU, in Triton's interpreter, with tiny shapes.")] = False,
) -> None:
    """Measure the missing figures, in order of importance."""
    chosen = only.split(",") if only else list(STAGES)
    for name in chosen:
        if name not in STAGES:
            _refuse(f"--only {name}: expected some of {', '.join(STAGES)}")
    if out is None and "OUT" not in os.environ:
        _refuse("no folder for the results: give --out or set OUT")
    folder = (out or Path(os.environ["OUT"])).resolve()
    if not dry and not _gpu_answers():
        _refuse("no CUDA GPU answers: --dry runs all stages on a CPU")
    factor = DRY_FACTOR if dry else 1
    seconds = seconds or factor * TOTAL_S
    began, results = time.monotonic(), Results(folder)
    if any(line.get("dry", dry) != dry for line in results.lines()):
        _refuse(f"{results.path} holds results {'of a GPU' if dry else 'of a dry run'}: give another folder")
    run = results.runs() + 1
    results.append(
        {"run": run, "dry": dry, "seconds": seconds, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    )
    failed = []
    for name in (name for name in STAGES if name in chosen):
        if name in results.done():
            print(f"{name}: done in an earlier run", flush=True)
            continue
        left = began + seconds - time.monotonic()
        outcome = (
            _run_stage(name, folder, run, min(factor * STAGES[name], left), dry) if left >= LEAST_S else _not_begun()
        )
        results.append({"run": run, "stage": name, **outcome})
        print(f"{name}: {outcome['status']} after {outcome['s']} s", flush=True)
        if outcome["status"] != "done":
            failed.append(name)
    print(f"{results.path}: {len(results.lines())} lines after {time.monotonic() - began:.0f} s")
    if failed:
        raise typer.Exit(1)


def _run_stage(name: str, folder: Path, run: int, limit_s: float, dry: bool) -> dict[str, Any]:
    """Runs one stage for at most ``limit_s``. If an error has destroyed the GPU's context, a new process continues."""
    began = time.monotonic()
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_suite.stages",
        name,
        str(folder),
        str(run),
        "dry" if dry else "gpu",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if dry:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if name == "compile":
        environment["TRITON_INTERPRET"] = "0"
    status = DEVICE_LOST
    with open(log, "ab") as output:
        while status == DEVICE_LOST:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(max(0.1, began + limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(process)
                return {"status": "out of time", "s": round(time.monotonic() - began, 1), "limit_s": round(limit_s, 1)}
            finally:
                if process.poll() is None:
                    _end(process)
    outcome = {"status": "failed" if status else "done", "s": round(time.monotonic() - began, 1)}
    return outcome | ({"exit": status, "log": str(log.relative_to(folder))} if status else {})


def _not_begun() -> dict[str, Any]:
    return {"status": "not begun", "s": 0.0, "reason": "the time for all stages is used up"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage with all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _gpu_answers() -> bool:
    # A separate process asks, so that this one stays small and takes no GPU memory.
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(asked, capture_output=True).returncode == 0


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
