"""Compiles every kernel variant in use for given GPUs, without a GPU, and reports registers, memory and instructions.

    python -m kernels.aot --arch 80 --arch 90 --json benchmarks/raw/aot.json

An operation with Triton kernels lists its compilations as `aot_variants()`, see `kernels.variant`. Registers, spills and
tensor-core instructions are read from the machine code with the `cuobjdump` that comes with Triton. If a variant states its
`pairs`, its row also contains the report of `kernels.instructions` on the longest path through the product loop
(``instructions_per_pair``, ``by_pipe``, ``tensor_repetition``, ``bound_share``, ``limited_by``). If a branch makes another
kind of tile cheaper, ``shortest_path`` has the same report for that path.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from kernels import instructions
from kernels.variant import Variant

MODULES = (
    "kernels.relative_attention.variants",
    "kernels.expert_ffn.variants",
    "kernels.gated_rms_norm.triton_form",
    "kernels.sampled_softmax.variants",
    "kernels.silu_split.triton_form",
)
# Shared memory that one program may have, in KiB, on A100 and H100.
SHARED_LIMIT_KIB = {80: 163, 90: 227}


def main(
    arch: Annotated[
        Optional[list[int]],  # noqa: UP045  (typer on Python 3.10)
        typer.Option(help="Compute capability, such as 80 or 90; can be repeated. Default: both."),
    ] = None,
    json_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", help="File to write the list to. Default: standard output."),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Compile only the variants whose name matches this regular expression.")
    ] = "",
) -> None:
    """Compile every kernel variant in use for these GPUs and list the resources of each as JSON."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it", file=sys.stderr)
        raise typer.Exit(2)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    variants = [variant for module in MODULES for variant in importlib.import_module(module).aot_variants()]
    variants = [variant for variant in variants if re.search(only, f"{variant.kernel.__name__} {variant.name}")]
    rows = []
    for variant in variants:
        for one in filter(variant.runs_on, arch or sorted(SHARED_LIMIT_KIB)):
            rows.append(compile_variant(variant, one))
            print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
    text = json.dumps(rows, indent=1) + "\n"
    if json_path is None:
        sys.stdout.write(text)
    else:
        json_path.write_text(text)


def compile_variant(variant: Variant, arch: int) -> dict[str, Any]:
    """Compiles one variant and returns its row of the report.

    Raises:
        RuntimeError: the kernel needs more shared memory than a program may have on that GPU.
    """
    # Imported here so that `main` can first reject an environment in which the interpreter replaces the compiler.
    import triton

    from kernels.compilation import compiled

    binary = compiled(variant, arch)
    usage, code = _disassemble(binary.asm["cubin"])
    shared = binary.metadata.shared
    if shared > SHARED_LIMIT_KIB.get(arch, 99) * 1024:
        raise RuntimeError(
            f"{variant.kernel.__name__} {variant.name} needs {shared} bytes of shared memory on sm_{arch}"
        )
    return {
        "kernel": variant.kernel.__name__,
        "variant": variant.name,
        "arch": arch,
        "registers": int(_found(r"REG:(\d+)", usage)),
        # The stack of a thread consists of spilled registers, because no kernel here has a local array.
        "spill_bytes": int(_found(r"STACK:(\d+)", usage)) + int(_found(r"LOCAL:(\d+)", usage)),
        "shared_bytes": shared,
        "tensor_core": len(re.findall(r"\bHG?MMA\b", code)),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "triton": triton.__version__,
        **_loop_report(variant, code, arch),
    }


def _loop_report(variant: Variant, code: str, arch: int) -> dict[str, Any]:
    paths = instructions.product_loop(instructions.parse(code)) if variant.pairs else None
    if paths is None:
        return {}
    longest, shortest = (
        instructions.bound(
            path,
            pairs=variant.pairs,
            flops_per_pair=variant.flops_per_pair,
            num_warps=variant.num_warps,
            arch=arch,
        )
        for path in (paths.longest, paths.shortest)
    )
    return longest if longest == shortest else {**longest, "shortest_path": shortest}


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no {pattern}: {text[:200]!r}")
    return match[1]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the machine code, as `cuobjdump` prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(option: str) -> str:
            done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        return run("-res-usage"), run("-sass")


if __name__ == "__main__":
    typer.run(main)
