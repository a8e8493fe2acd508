"""Summarises the compilations of `kernels.aot` by kernel and GPU architecture: registers, spills, shared memory.

python -m kernels.aot --arch 80 --arch 90 --json benchmarks/raw/aot.json
python -m benchmarks.aot_summary benchmarks/raw/aot.json --json benchmarks/results/aot.json
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.json_file import write_json


def main(
    raw: Annotated[Path, typer.Argument(help="Output of `kernels.aot`: one object per variant and architecture.")],
    output: Annotated[Path, typer.Option("--json", help="File to write the summary to.")],
) -> None:
    """Summarises the compilations of all kernel variants."""
    write_json(output, summary(json.loads(raw.read_text())))


def summary(compilations: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows by kernel and architecture, and every variant that spills registers.

    A row has the number of variants, the least and most registers per thread, the most shared memory per block, and the number
    of variants that use tensor cores.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for found in compilations:
        groups[found["kernel"], found["arch"]].append(found)
    rows = [
        {
            "kernel": kernel,
            "arch": arch,
            "variants": len(group),
            "registers": [min(found["registers"] for found in group), max(found["registers"] for found in group)],
            "shared_bytes": max(found["shared_bytes"] for found in group),
            "with_tensor_cores": sum(found["tensor_core"] > 0 for found in group),
        }
        for (kernel, arch), group in sorted(groups.items())
    ]
    spilling = [
        {key: found[key] for key in ("kernel", "variant", "arch", "spill_bytes")}
        for found in compilations
        if found["spill_bytes"]
    ]
    return {"triton": sorted({found["triton"] for found in compilations}), "rows": rows, "spilling": spilling}


if __name__ == "__main__":
    typer.run(main)
