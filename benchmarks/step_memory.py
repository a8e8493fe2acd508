"""How much memory does a training step take beyond its weights, on the kernels and in eager padded PyTorch?

    python -m benchmarks.step_memory --lengths 2048,4096,8192 --json out.json

Measures forward, loss and backward of FuXi-α (one table, dense FFN, per-token negatives) on one batch of full-length histories.
`kernels` is `mme.model` with the backend `auto`, `padded` is `benchmarks.padded_fuxi`. The peak is that of the allocator on a GPU
and that of the resident set on a CPU. The padded form is skipped if it would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.padded_fuxi import PaddedFuxi
from benchmarks.roofline import JsonPath, device_and_dtype, peak_memory, publish, run_header
from kernels import sampled_softmax_loss
from mme.config import Config, load_config
from mme.data.batch import SequenceBatch
from mme.model.decoder import Decoder

NUM_ITEMS = 20_000
# Number of (B, N, N) matrices per head that autograd keeps of a padded block: three weights, scores and masks.
PADDED_MATRICES = 12
MEMORY_LIMIT_BYTES = {"cuda": 64 << 30, "cpu": 8 << 30}


def main(
    lengths: Annotated[str, typer.Option(help="N, such as 2048,8192; on a CPU 1024 and 2048 by default")] = "",
    sequences: Annotated[int, typer.Option(help="sequences of a batch; 0: 4 on a GPU, 1 on a CPU")] = 0,
    width: Annotated[int, typer.Option(help="D, the width of the table")] = 64,
    blocks: Annotated[int, typer.Option(help="FuXi blocks")] = 2,
    json_path: JsonPath = None,
) -> None:
    """Prints a table of peaks and, with --json, writes them."""
    device, _ = device_and_dtype()
    sequences = sequences or (4 if device.type == "cuda" else 1)
    rows = []
    asked = lengths or ("2048,4096,8192" if device.type == "cuda" else "1024,2048")
    for longest in (int(x) for x in asked.split(",")):
        rows += measure(longest, sequences, width, blocks, device)
    cells = []
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        cells.append((str(row["longest"]), str(row["sequences"]), row["form"], f"{row['step_mem_gib']:.3f}", share))
    columns = ("N", "sequences", "form", "step GiB", "of padded")
    header = run_header(device, torch.float32, width=width, blocks=blocks)
    publish("Memory of a training step", header, columns, cells, rows, json_path)


def measure(longest: int, sequences: int, width: int, blocks: int, device: torch.device) -> list[dict[str, Any]]:
    """The peak of each form that fits, and its share of the peak of the padded form."""
    config = load_config(
        None,
        [
            "data.path=unused",
            f"data.max_seq_len={longest}",
            "model.num_tables=1",
            f"model.embedding_dim={width}",
            f"model.num_blocks={blocks}",
            "model.moe.num_experts=0",
        ],
    )
    batch = full_batch(longest, sequences).to(device)
    steps: dict[str, Callable[[], Tensor]] = {"kernels": kernel_step(config, batch, device)}
    if (
        4 * PADDED_MATRICES * blocks * sequences * config.model.num_heads * longest**2
        <= MEMORY_LIMIT_BYTES[device.type]
    ):
        padded = PaddedFuxi(config, NUM_ITEMS).to(device)
        steps["padded"] = lambda: padded(batch)
    peaks = {}
    for name, step in steps.items():
        step().backward()  # allocates gradients and what libraries set up at first use
        peaks[name] = peak_memory(lambda step=step: step().backward(), device)  # type: ignore[misc]
    shape = {"longest": longest, "sequences": sequences}
    padded_peak = peaks.get("padded")
    return [
        shape | {"form": name, "step_mem_gib": peak, "share": peak / padded_peak if padded_peak else None}
        for name, peak in peaks.items()
    ]


def full_batch(longest: int, sequences: int) -> SequenceBatch:
    """Histories of ``longest`` events with random items and rising times."""
    random = torch.Generator().manual_seed(longest)
    items = torch.randint(NUM_ITEMS, (sequences, longest + 1), generator=random)
    steps = torch.exp(13 * torch.rand(sequences, longest + 1, generator=random)).long()
    return SequenceBatch(
        item_ids=items[:, :-1].flatten(),
        seq_offsets=longest * torch.arange(sequences + 1),
        timestamps=(1_500_000_000 + steps.cumsum(1)).flatten(),
        target_ids=items[:, 1:].flatten(),
        user_rows=torch.arange(sequences),
    )


def kernel_step(
    config: Config, batch: SequenceBatch, device: torch.device, decoder: Decoder | None = None
) -> Callable[[], Tensor]:
    """The mean loss of ``batch``, with the decoder and the loss of training and one local table."""
    decoder = decoder or Decoder(config).to(device)
    table = torch.nn.Embedding(NUM_ITEMS, config.model.embedding_dim, device=device)

    def step() -> Tensor:
        views = table.weight.unflatten(1, (config.model.num_tables, -1))
        keys = torch.arange(batch.num_sequences, device=device)
        out = decoder(views, batch.item_ids, batch.seq_offsets, batch.timestamps, dropout_keys=keys)
        queries, items = (
            F.normalize(x.flatten(1).float(), dim=-1, eps=1e-6).to(out.hidden.dtype) for x in (out.hidden, table.weight)
        )
        negatives = torch.randint(NUM_ITEMS, (batch.num_tokens, config.loss.num_negatives), device=device)
        temperature = config.loss.temperature
        return sampled_softmax_loss(queries, items, batch.target_ids, negatives, temperature=temperature).mean()

    return step


if __name__ == "__main__":
    typer.run(main)
