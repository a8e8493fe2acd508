"""The devices that planning knows: memory, published peaks, and the share of a peak that training is assumed to reach.

`launcher plan` computes with them, and TorchRec's planner is told them. Nothing here was fitted to a GPU. The CPU's figures
are orders of magnitude, except for the heap shares, which were measured.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mme.errors import UserError


@dataclass(frozen=True)
class Device:
    """The device of one rank and its links. Rates are published peaks in one direction.

    Attributes:
        memory: bytes that a rank may fill.
        host_memory: bytes of host memory that a rank may fill; on a CPU the same as ``memory``.
        runtime: bytes used before the model is built: libraries, the driver's context, NCCL's buffers.
        heap_share: memory lost to fragmentation, as a share of what a step allocates and frees.
        heap_share_of_rows: the same share for tensors as long as the looked-up rows or the tables. These are few and
            their lengths vary, so that a freed block rarely fits the next step's tensor.
        host_memory_bytes_per_s: rate of a rank's share of host memory.
        host_link_bytes_per_s: rate between a GPU and host memory.
        local_bytes_per_s: rate between ranks of one node.
        network_bytes_per_s: rate of one rank to other nodes.
        local_latency_s, network_latency_s: latency of one message.
        message_s: cost of each further message of the same exchange.
        host_step_s, host_block_s: time in Python, TorchRec, DeepSpeed and kernel launches, per step and per block.
        efficiency: assumed share of a peak that is reached.
    """

    name: str
    is_gpu: bool
    memory: float
    host_memory: float
    runtime: float
    heap_share: float
    heap_share_of_rows: float
    float32_flops: float
    bfloat16_flops: float
    memory_bytes_per_s: float
    host_memory_bytes_per_s: float
    host_link_bytes_per_s: float
    local_bytes_per_s: float
    network_bytes_per_s: float
    local_latency_s: float
    network_latency_s: float
    message_s: float
    host_step_s: float
    host_block_s: float
    efficiency: float = 0.5


CONTROL_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # versions 2, 1
GIB = 2**30
FILLED = 0.95  # share of a GPU's memory that a rank may fill; the rest is for what the cost model leaves out
_A100 = Device(
    name="a100-80g",
    is_gpu=True,
    memory=FILLED * 79 * GIB,  # the driver leaves 79 of 80 GiB
    host_memory=128 * GIB,  # 1 TiB for the eight GPUs of a DGX A100 with 40 GB cards; others have more
    runtime=2e9,
    heap_share=0.1,
    heap_share_of_rows=0.2,
    float32_flops=19.5e12,  # without tensor cores
    bfloat16_flops=312e12,  # with them, dense
    memory_bytes_per_s=2.04e12,
    host_memory_bytes_per_s=51e9,  # 16 channels of DDR4-3200 for eight GPUs
    host_link_bytes_per_s=32e9,  # PCIe 4.0 × 16
    local_bytes_per_s=300e9,  # NVLink 3
    network_bytes_per_s=25e9,  # one HDR InfiniBand port per GPU, 200 Gbit/s
    local_latency_s=5e-6,
    network_latency_s=10e-6,
    message_s=1e-6,
    host_step_s=5e-3,
    host_block_s=1e-3,
)
_H100 = replace(
    _A100,
    name="h100-80g",
    host_memory=256 * GIB,  # 2 TiB for the eight GPUs of a DGX H100
    float32_flops=67e12,
    bfloat16_flops=989e12,
    memory_bytes_per_s=3.35e12,
    host_memory_bytes_per_s=77e9,  # 16 channels of DDR5-4800 for eight GPUs
    host_link_bytes_per_s=64e9,  # PCIe 5.0 × 16
    local_bytes_per_s=450e9,  # NVLink 4
    network_bytes_per_s=50e9,  # NDR, 400 Gbit/s
)
# Rates without sparsity, as published for these cards. Memory in GiB: CUDA reports 139 on an H200, sold as 141 GB; the 178 of a
# B200 are taken from published listings.
_H200 = replace(_H100, name="h200", memory=FILLED * 139 * GIB, memory_bytes_per_s=4.8e12)
_B200 = replace(
    _H100,
    name="b200",
    memory=FILLED * 178 * GIB,
    float32_flops=75e12,
    bfloat16_flops=2250e12,
    memory_bytes_per_s=7.7e12,
    local_bytes_per_s=900e9,  # NVLink 5
)
_L40S = replace(
    _A100,
    name="l40s",
    memory=FILLED * 44 * GIB,  # 48 GB of GDDR6 with error correction
    float32_flops=91.6e12,
    bfloat16_flops=362e12,
    memory_bytes_per_s=864e9,
    local_bytes_per_s=32e9,  # PCIe 4.0 × 16: no NVLink
)
# One core with AVX2 and its share of the memory bandwidth; gloo over the loopback and over a 10 Gbit/s network.
_CPU = Device(
    name="cpu",
    is_gpu=False,
    memory=0,  # `device_of` divides this machine's memory among the ranks of a node
    host_memory=0,
    runtime=0.45e9,
    heap_share=0.35,  # both measured on 1 and 2 processes, see docs/multi-node.md
    heap_share_of_rows=0.75,
    float32_flops=80e9,
    bfloat16_flops=80e9,
    memory_bytes_per_s=12e9,
    host_memory_bytes_per_s=12e9,
    host_link_bytes_per_s=12e9,
    local_bytes_per_s=2e9,
    network_bytes_per_s=1.2e9,
    local_latency_s=100e-6,
    network_latency_s=200e-6,
    message_s=50e-6,
    host_step_s=5e-3,
    host_block_s=1e-3,
)
DEVICES = {device.name: device for device in (_A100, _H100, _H200, _B200, _L40S, _CPU)}


def device_of(name: str, ranks_per_node: int) -> Device:
    """The device called ``name``. A CPU rank gets an equal share of this machine's memory.

    Raises:
        UserError: no device has that name.
    """
    if name not in DEVICES:
        raise UserError(f"--gpu {name}: expected {', '.join(DEVICES)}")
    device = DEVICES[name]
    if device.is_gpu:
        return device
    here = memory_here() / ranks_per_node
    return replace(device, memory=here, host_memory=here)


def gpu_here(name: str, memory: float, ranks_per_node: int) -> Device:
    """This machine's GPU, by the ``name`` and bytes of ``memory`` that its driver reports.

    An unknown GPU gets the rates of an A100, on which only the choices of `parallel.table_sharding=auto` depend.
    """
    known = (
        device for key, device in DEVICES.items() if device.is_gpu and key.partition("-")[0].upper() in name.upper()
    )
    return replace(next(known, _A100), name=name, memory=FILLED * memory, host_memory=memory_here() / ranks_per_node)


def memory_here() -> float:
    """Bytes of this machine's memory, or of its container's limit."""
    found = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CONTROL_GROUP_LIMITS:
        with suppress(OSError, ValueError):  # only one version's file exists; without a limit it contains "max"
            found = min(found, float(Path(limit).read_text()))
    return found


def in_words(num_bytes: float) -> str:
    """A size in a readable unit: 1536 · 2**20 → "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def peak_flops(cuda_name: str, precision: str) -> float | None:
    """The published dense peak, in FLOPs per second, of the GPU that CUDA calls ``cuda_name``; None: not listed here.

    Products in float32 run as TF32 (`mme.distributed.world`), whose peak is half of bfloat16's on all of these GPUs.
    """
    words = cuda_name.lower().replace("-", " ").split()  # such as NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3
    for device in DEVICES.values():
        if device.is_gpu and device.name.split("-")[0] in words and "pcie" not in words:
            return device.bfloat16_flops if precision == "bfloat16" else device.bfloat16_flops / 2
    return None
