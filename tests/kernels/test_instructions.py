"""Instructions are counted correctly in machine code written for the test and in a compiled kernel with known products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.instructions import bound, parse, product_loop

# A loop from 0x20 to 0xb0 whose branch at 0x30 leads through 0x40..0x60 or through the block at 0x100, which is out of line and
# contains another loop; before it there is a longer loop without tensor-core instructions.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDS R2, [R0] ;
        /*0030*/              @!P0 BRA 0x100 ;
        /*0040*/                   FADD R3, R3, 1 ;
        /*0050*/                   MUFU.TANH R3, R3 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R3, R3, R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   ISETP.GE.AND P1, PT, R0, R5, PT ;
        /*00b0*/              @!P1 BRA 0x20 ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00d0*/                   EXIT ;
        /*0100*/                   IADD3 R6, R6, 0x1, RZ ;
        /*0110*/                   FFMA R7, R7, R7, R7 ;
        /*0120*/              @!P2 BRA 0x100 ;
        /*0130*/                   FFMA R7, R7, R7, R7 ;
        /*0140*/                   FFMA R7, R7, R7, R7 ;
        /*0150*/                   FFMA R7, R7, R7, R7 ;
        /*0160*/                   BRA 0x70 ;
        /*0170*/                   BRA 0x170;
"""


def test_paths_through_the_product_loop() -> None:
    paths = product_loop(parse(CODE))
    assert paths is not None
    assert [hex(i.address) for i in paths.shortest] == [hex(16 * n) for n in range(2, 12)]
    out_of_line = [0x20, 0x30, *range(0x100, 0x170, 16), *range(0x70, 0xC0, 16)]
    assert [i.address for i in paths.longest] == out_of_line


def test_bound_of_a_pass() -> None:
    """10 instructions of 2 warps for 32 pairs are 20 per pair. Two products of 16 × 8 × 16 per warp are 512 FLOPs per pair."""
    paths = product_loop(parse(CODE))
    assert paths is not None
    report = bound(paths.shortest, pairs=32, flops_per_pair=256, num_warps=2, arch=90)
    assert report["instructions_per_pair"] == 20
    assert report["by_pipe"] == {
        "tensor": 4, "special_function": 2, "float": 2, "integer": 4, "shared_memory": 2, "global_memory": 0,
        "barrier": 2, "other": 4,
    }  # fmt: skip
    assert report["tensor_repetition"] == 2
    assert report["limited_by"] == "issue" and report["bound_share"] == pytest.approx(256 / 4096 / (20 / 128))
    slower = bound(paths.shortest, pairs=32, flops_per_pair=512, num_warps=2, arch=80)
    assert slower["limited_by"] == "tensor" and slower["bound_share"] == 1


def test_code_without_a_loop_is_not_counted() -> None:
    assert product_loop(parse("\n".join(CODE.splitlines()[13:15]))) is None


KERNEL = """
import json, sys
import triton, triton.language as tl
from kernels.aot import compile_variant
from kernels.variant import Variant

@triton.jit
def known_kernel(p_a, p_b, p_c, steps, WIDTH: tl.constexpr):
    i_row, i_column = tl.arange(0, 64), tl.arange(0, WIDTH)
    b_a = tl.load(p_a + i_row[:, None] * WIDTH + i_column[None, :])
    b_c = tl.zeros([64, 64], tl.float32)
    for i in range(0, steps):
        b_c = tl.dot(b_a, tl.load(p_b + i * 64 * WIDTH + i_column[:, None] * 64 + i_row[None, :]), b_c)
    tl.store(p_c + i_row[:, None] * 64 + i_row[None, :], b_c)

types = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32", "steps": "i32"}
rows = []
for num_warps in (4, 8):
    variant = Variant(known_kernel, "known", types, {"WIDTH": 64}, num_warps, 2, pairs=64 * 64, flops_per_pair=128)
    rows += [compile_variant(variant, arch) for arch in (80, 90)]
print(json.dumps(rows))
"""


def test_a_compiled_kernel_of_known_products(tmp_path: Path) -> None:
    """64 × 64 × 64 multiply-adds per pass: 32 of 16 × 8 × 16 per warp on sm_80, 4 of 64 × 64 × 16 per warp group on sm_90."""
    pytest.importorskip("triton")
    script = tmp_path / "known.py"
    script.write_text(KERNEL)
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    ampere, hopper, ampere_wide, hopper_wide = json.loads(done.stdout)
    assert ampere["by_pipe"]["tensor"] == 32 * 128 / 4096 and ampere["tensor_repetition"] == 1
    assert hopper["by_pipe"]["tensor"] == 4 * 128 / 4096 and hopper["tensor_repetition"] == 1
    assert ampere_wide["tensor_repetition"] == 1
    assert hopper_wide["tensor_repetition"] in (1, 2)
    for row in (ampere, hopper):
        assert sum(row["by_pipe"].values()) == pytest.approx(row["instructions_per_pair"], abs=0.05)
        assert 0 < row["bound_share"] <= 1
