"""What `kernels.aot` compiles is what a launch compiles: types, constants, alignment and launch options.

Launches are made without a GPU: the kernels' `run` is replaced by one that derives, as Triton does, what it would compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.relative_attention.triton_form import LaunchConfig, attention_op
from kernels.relative_attention.variants import aot_variants
from kernels.relative_attention.work_plan import make_work_lists

backend = make_backend(GPUTarget("cuda", 90, 32))
launched = {}


def described(kernel, types, constants, divisible, num_warps, num_stages):
    return [kernel, sorted(types.items()), sorted(constants.items()), sorted(divisible), num_warps, num_stages]


def run(self, *args, grid, warmup, **kwargs):
    binder = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    kinds = dict(zip(self.arg_names, specialization))
    types = {name: kind for name, (kind, _) in kinds.items() if kind != "constexpr"}
    constants = {name: bound[name] for name, (kind, _) in kinds.items() if kind == "constexpr"}
    divisible = [name for name, (kind, key) in kinds.items() if kind != "constexpr" and key == "D"]
    found = described(self.__name__, types, constants, divisible, options["num_warps"], options["num_stages"])
    launched.setdefault(json.dumps(found), tokens)


JITFunction.run = run
for tokens in (64, 61, 1):
    torch.manual_seed(0)
    offsets, longest = torch.tensor([0, tokens]), tokens
    q, k, v = (torch.randn(4, tokens, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    times, ts_weights, pos_weights = torch.arange(tokens + 1), torch.randn(129), torch.randn(2 * longest - 1)
    lists = make_work_lists(offsets, times, longest, LaunchConfig.choose_block(16, 16, 2, "ieee")).tensors()
    attention_op(q, k, v, ts_weights, pos_weights, offsets, times, lists, longest, True, "ieee").sum().backward()

compiled = [
    json.dumps(described(
        variant.kernel.__name__, variant.types, variant.constants,
        [name for name, kind in variant.types.items() if kind[0] == "*" or name in variant.multiples_of_16],
        variant.num_warps, variant.num_stages,
    ))
    for variant in aot_variants() if variant.runs_on(90) and variant.name.startswith("bf16 G=4 dqk=16 dv=16")
]
print(json.dumps({"launched": launched, "compiled": compiled}))
"""


def test_a_launch_compiles_what_aot_compiles(tmp_path: Path) -> None:
    """Whatever the number of tokens: one, a multiple of 16, another."""
    script = tmp_path / "launches.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run([sys.executable, script], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["launched"]) == set(found["compiled"])
    assert len(found["compiled"]) == len(set(found["compiled"])) == 12
