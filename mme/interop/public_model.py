"""Reads whole models that the public FuXi-α code has trained (arXiv 2502.03036).

Its trainer saves `{"epoch", "model_state_dict", "optimizer_state_dict"}` with `torch.save`. Row r of its item table is the item
with id r, and row 0 is padding. Its N counts the places of a sequence and of its targets.

Legend: I items, D width, f hidden width of the FFN, N places, H heads.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mme.config import load_config
from mme.data.numbering import Numbering
from mme.errors import UserError, first_line
from mme.files import open_to_read
from mme.inference.model import Knowledge, TrainedModel

ITEMS, POSITIONS = "_embedding_module._item_emb.weight", "_input_features_preproc._pos_emb.weight"
BLOCK = re.compile(r"_fuxi\._attention_layers\.(\d+)\.")
OF_BLOCK = {
    "uvqk": "_uvqk",
    "ts_weights": "_rel_attn_bias._ts_w",
    "pos_weights": "_rel_attn_bias._pos_w",
    "output.weight": "_mffn.lin0.weight",
    "output.bias": "_mffn.lin0.bias",
}
TRANSPOSED = {"ffn.experts.w1": "_mffn.lin1.weight", "ffn.experts.w3": "_mffn.lin3.weight", "ffn.experts.w2": "_mffn.lin2.weight"}  # fmt: skip


def model_from_public(
    path: str | Path,
    *,
    num_heads: int = 1,
    times: tuple[int, int] = (0, 2**31 - 1),
    device: str | torch.device | None = None,
) -> TrainedModel:
    """A model from a checkpoint of the public code, which recommends, scores, embeds and exports like `mme.load`'s.

    The code's other models (HSTU, SASRec), layer norm of the user embedding and a single-stage FFN are rejected. The public code
    reads the newest ``max_sequence_length`` events of a history; this model reads up to N. The checkpoint does not tell
    how often items occur, so a history without a known item gets the items with the smallest ids.

    Args:
        path: file that the public trainer wrote into `ckpts/`. Only tensors are unpickled.
        num_heads: H, `fuxi_encoder.num_heads`, which the shapes do not tell.
        times: first and last second of the training data; histories with times in another unit are rejected.
        device: where to compute; None selects CUDA if available, otherwise the CPU.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of a public FuXi-α model.
    """
    source = Path(path)
    try:
        with open_to_read(source) as file:
            saved: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{source}: not a checkpoint of torch.save with tensors only ({first_line(error)})") from error
    state = saved.get("model_state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source}: has no model_state_dict of tensors")
    return _model(state, str(source), num_heads, times, device)


def _model(
    saved: Mapping[str, Tensor], source: str, num_heads: int, times: tuple[int, int], device: str | torch.device | None
) -> TrainedModel:
    # DistributedDataParallel puts "module." in front of each name.
    state = {name.removeprefix("module."): value.float() for name, value in saved.items() if "_attn_mask" not in name}
    blocks = 1 + max((int(found[1]) for name in state if (found := BLOCK.match(name))), default=-1)
    expected = {ITEMS, POSITIONS} | {
        f"_fuxi._attention_layers.{block}.{name}"
        for block in range(max(1, blocks))
        for name in [*OF_BLOCK.values(), *TRANSPOSED.values()]
    }
    if expected != set(state):
        name = min(expected ^ set(state))
        raise UserError(f"{source}: {'no' if name in expected else 'unknown'} tensor {name}, expected those of FuXi-α")

    def of_block(block: int, name: str) -> Tensor:
        return state[f"_fuxi._attention_layers.{block}.{name}"]

    dim, values = of_block(0, "_mffn.lin0.weight").shape  # (D, 3 · H · dv)
    dv = values // (3 * num_heads)
    dqk = (of_block(0, "_uvqk").shape[1] // num_heads - 4 * dv) // 2
    if values != 3 * num_heads * dv or of_block(0, "_uvqk").shape[1] != num_heads * (4 * dv + 2 * dqk) or dqk < 1:
        raise UserError(f"{source}: num_heads ({num_heads}) does not divide the widths of its projections")
    hidden_dim = of_block(0, "_mffn.lin1.weight").shape[0]
    config = load_config(
        {
            "data": {"path": "", "max_seq_len": state[POSITIONS].shape[0]},
            "model": {
                "num_tables": 1,
                "embedding_dim": dim,
                "num_blocks": blocks,
                "num_heads": num_heads,
                "dqk": dqk,
                "dv": dv,
                "ffn_multiplier": hidden_dim / dim,
                "moe": {"num_experts": 0},
            },
        },
        [],
    )
    weights = {"tables/item_0": state[ITEMS][1:].contiguous(), "decoder/inputs.positions": state[POSITIONS][None]}
    for block in range(blocks):
        weights |= {f"decoder/blocks.{block}.{ours}": of_block(block, name) for ours, name in OF_BLOCK.items()}
        weights |= {
            f"decoder/blocks.{block}.{ours}": of_block(block, name).T[None].contiguous()
            for ours, name in TRANSPOSED.items()
        }
    items = weights["tables/item_0"].shape[0]
    knowledge = Knowledge(Numbering(pa.array(np.arange(1, items + 1)), {}, None), np.zeros(items, np.int64), times)
    return TrainedModel(config, knowledge, weights, source, device)
