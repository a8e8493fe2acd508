"""Counts the machine instructions of a kernel's innermost product loop and derives the bound that they set.

The input is the output of `cuobjdump -sass`. The code is divided into basic blocks; a loop is the set of blocks from which its
backward branch can be reached without passing its head. The product loop is the innermost loop with the most tensor-core
instructions or, in a kernel without any, the longest innermost loop. One pass is counted along the longest and along the
shortest path from head to backward branch. If a tile takes one of two branches, these are the most and the least expensive
kind of tile. A loop inside the product loop counts as one pass.

An instruction is issued once per warp of 32 threads. If a program covers ``pairs`` pairs in one pass, then instructions per
pair = instructions per pass · 32 · num_warps / pairs. The pipe that takes the most cycles limits the kernel. Latency and
barriers come on top, so ``bound_share`` is an upper bound of the share of the bf16 matrix rate. The rates are those of NVIDIA's
data sheets and of the table of arithmetic throughput in the CUDA C++ programming guide.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PIPES = ("tensor", "special_function", "float", "integer", "shared_memory", "global_memory", "barrier", "other")
_PIPE_PATTERNS = (
    ("tensor", r"(HMMA|HGMMA|IMMA|QGMMA)"),
    ("special_function", r"(MUFU|F2F\b|I2F\b|F2I\b|FRND)"),
    ("shared_memory", r"(LDS|LDSM|STS|STSM|SHFL|REDUX)"),
    ("global_memory", r"(LDG|LDGSTS|STG|LD\b|ST\b|LDL|STL|RED|ATOM|UTMA)"),
    ("barrier", r"(BAR|WARPSYNC|WARPGROUP|SYNCS|DEPBAR|LDGDEPBAR|FENCE|MEMBAR|BSSY|BSYNC|BREAK|ERRBAR)"),
    ("float", r"(FADD|FMUL|FFMA|FMNMX|FSEL|FSET|FCHK|FSWZ|HADD|HMUL|HFMA|HMNMX|HSET|DADD|DMUL|DFMA)"),
    (
        "integer",
        r"(IADD|IMAD|LEA|LOP|SHF|SHL|SHR|ISETP|IMNMX|SEL|PRMT|IABS|VIADD|VIMNMX|PLOP|BMSK|SGXT|POPC|FLO|VABS|I2FP|F2FP)",
    ),
)


@dataclass(frozen=True)
class Rates:
    """What one SM executes per clock: thread instructions of each kind, and bf16 FLOPs of its tensor cores."""

    tensor_flops: int
    special_function: int
    float_: int
    integer: int
    memory: int
    issue: int = 128


# A100: 312 TFLOP/s = 108 SMs × 1.41 GHz × 2048. H100: 989 TFLOP/s = 132 SMs × 1.83 GHz × 4096.
RATES = {
    80: Rates(tensor_flops=2048, special_function=16, float_=64, integer=64, memory=32),
    90: Rates(tensor_flops=4096, special_function=16, float_=128, integer=64, memory=32),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def pipe(self) -> str:
        for pipe, pattern in _PIPE_PATTERNS:
            if re.match(pattern, self.opcode):
                return pipe
        return "other"

    @property
    def tensor_flops(self) -> int:
        """FLOPs of one warp. TF32 counts twice, because its rate is half of bf16's."""
        match = re.match(r"HGMMA\.64x(\d+)x(\d+)", self.opcode)
        if match:
            flops = 2 * 16 * int(match[1]) * int(match[2])  # 64 rows over the four warps of a warp group
        else:
            match = re.match(r"HMMA\.16(8)(8|16|4)\b", self.opcode)
            flops = 2 * 16 * int(match[1]) * int(match[2]) if match else 0
        return flops * (2 if "TF32" in self.opcode else 1)

    @property
    def target(self) -> int | None:
        """The address that a branch inside the kernel jumps to."""
        match = (
            re.match(r"BRA\b.*?(0x[0-9a-f]+)\s*$", self.text[self.text.find("BRA") :]) if "BRA" in self.text else None
        )
        return int(match[1], 16) if match else None

    @property
    def falls_through(self) -> bool:
        return self.text.startswith("@") or self.opcode.split(".")[0] not in ("BRA", "EXIT", "RET", "JMP")


def parse(sass: str) -> list[Instruction]:
    """The instructions of the one kernel in ``sass``."""
    found = (re.match(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", line) for line in sass.splitlines())
    return [Instruction(int(match[1], 16), match[2]) for match in found if match]


@dataclass(frozen=True)
class LoopPaths:
    """One pass through a loop: the instructions on its longest and its shortest path."""

    longest: list[Instruction]
    shortest: list[Instruction]


def product_loop(instructions: list[Instruction]) -> LoopPaths | None:
    """The paths through the product loop, see the module's docstring; None if the kernel has no loop."""
    blocks, successors = _basic_blocks(instructions)
    loops = _natural_loops(successors)
    if not loops:
        return None

    def tensors(members: Iterable[int]) -> int:
        return sum(instruction.pipe == "tensor" for i in members for instruction in blocks[i])

    products = {edge: members for edge, members in loops.items() if tensors(members)} or loops
    innermost = {e: m for e, m in products.items() if not any(other < m for other in products.values())}
    size = {edge: sum(len(blocks[i]) for i in members) for edge, members in innermost.items()}
    # The first of several equal loops is the loop over full tiles; the masked one of the diagonal follows it.
    edge = max(innermost, key=lambda e: (tensors(innermost[e]), 0 if tensors(innermost[e]) else size[e], -e[1]))
    walk = _Walk(blocks, successors, innermost[edge], *edge)
    return LoopPaths(walk.path(longest=True), walk.path(longest=False))


@dataclass(frozen=True)
class _Walk:
    """The paths through one loop, from ``head`` to the backward branch of ``tail``."""

    blocks: list[list[Instruction]]
    successors: list[list[int]]
    members: frozenset[int]
    tail: int
    head: int

    def path(self, longest: bool) -> list[Instruction]:
        found: dict[int, list[Instruction] | None] = {}

        def from_block(i: int) -> list[Instruction] | None:
            """The instructions from block ``i`` to the end of the pass; None if the block leads back into an inner loop."""
            if i not in found:
                found[i] = None
                following = [j for j in self.successors[i] if j in self.members and j != self.head]
                rests = [[]] if i == self.tail else [rest for j in following if (rest := from_block(j)) is not None]
                if rests:
                    found[i] = self.blocks[i] + (max if longest else min)(rests, key=len)
            return found[i]

        return from_block(self.head) or []


def bound(path: list[Instruction], *, pairs: int, flops_per_pair: float, num_warps: int, arch: int) -> dict[str, Any]:
    """The report on one pass: its instructions per pair and the bound that they set.

    Args:
        path: the instructions of one pass of one warp.
        pairs: number of pairs that a program covers in one pass.
        flops_per_pair: FLOPs that the products of a pair need.
        num_warps: warps of a program.
        arch: compute capability, such as 90.

    Returns:
        ``instructions_per_pair``, ``by_pipe``, ``tensor_repetition`` (FLOPs that the tensor cores execute over FLOPs needed;
        padded widths and warps that compute the same tile raise it), ``bound_share`` and ``limited_by``.
    """
    lanes = 32 * num_warps / pairs
    by_pipe = dict.fromkeys(PIPES, 0.0)
    for instruction in path:
        by_pipe[instruction.pipe] += lanes
    tensor_flops = sum(instruction.tensor_flops for instruction in path) * num_warps / pairs
    rates = RATES[90 if arch >= 90 else 80]
    clocks = {
        "tensor": tensor_flops / rates.tensor_flops,
        "special_function": by_pipe["special_function"] / rates.special_function,
        "float": by_pipe["float"] / rates.float_,
        "integer": by_pipe["integer"] / rates.integer,
        "memory": (by_pipe["shared_memory"] + by_pipe["global_memory"]) / rates.memory,
        "issue": len(path) * lanes / rates.issue,
    }
    limited_by = max(clocks, key=clocks.__getitem__)
    return {
        "instructions_per_pair": round(len(path) * lanes, 3),
        "by_pipe": {pipe: round(count, 3) for pipe, count in by_pipe.items()},
        "tensor_repetition": round(tensor_flops / flops_per_pair, 2) if flops_per_pair else 0.0,
        "bound_share": round(flops_per_pair / rates.tensor_flops / clocks[limited_by], 3),
        "limited_by": limited_by,
    }


def _basic_blocks(instructions: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The blocks in address order, and the indices of the successors of each."""
    starts = {instructions[0].address} | {i.target for i in instructions if i.target is not None}
    after = itertools.pairwise(instructions)
    starts |= {following.address for i, following in after if i.target is not None or not i.falls_through}
    blocks: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    index = {block[0].address: i for i, block in enumerate(blocks)}
    successors = []
    for i, block in enumerate(blocks):
        following = [index[block[-1].target]] if block[-1].target in index else []
        if block[-1].falls_through and i + 1 < len(blocks):
            following.append(i + 1)
        successors.append(following)
    return blocks, successors


def _natural_loops(successors: list[list[int]]) -> dict[tuple[int, int], frozenset[int]]:
    """The blocks of each loop by its backward edge (tail, head)."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].append(i)
    loops = {}
    for tail, following in enumerate(successors):
        for head in following:
            if head > tail:
                continue
            members, waiting = {head, tail}, [tail] if tail != head else []
            while waiting:
                for before in predecessors[waiting.pop()]:
                    if before not in members:
                        members.add(before)
                        waiting.append(before)
            # A block placed out of line jumps back too, but the kernel's entry reaches such an edge without passing its head.
            entered = head == 0 or 0 not in members
            endless = (
                members == {head} and tail == head and len(predecessors[head]) == 1
            )  # the trap after the last EXIT
            if entered and not endless:
                loops[tail, head] = frozenset(members)
    return loops
