"""SASRec, LiGR and HSTU blocks compared with dense float64 definitions of one sequence, and the memory of a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mme.config import load_config
from mme.errors import UserError
from mme.model.baselines import ROWS_AT_ONCE, HSTUBlock, LiGRBlock, SASRecBlock
from mme.model.decoder import Decoder

NUM_VIEWS, DIM, HEADS, DQK, DV, HIDDEN, N = 3, 8, 2, 3, 5, 12, 9
LENGTHS = [4, 0, 9, 1, 7]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "sasrec": lambda: SASRecBlock(DIM, HEADS, DQK, DV, HIDDEN),
    "sasrec_norm_last": lambda: SASRecBlock(DIM, HEADS, DQK, DV, HIDDEN, norm_first=False),
    "ligr": lambda: LiGRBlock(DIM, HEADS, DQK, DV, HIDDEN),
    "hstu": lambda: HSTUBlock(DIM, N, HEADS, DQK, DV),
}
BASELINES = ["sasrec", "ligr", "hstu"]  # names in `model.block`


def make(kind: str) -> nn.Module:
    torch.manual_seed(1)
    block = KINDS[kind]()
    with torch.no_grad():
        for parameter in block.parameters():  # biases, scales and time weights must matter
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return block.double()


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(NUM_VIEWS, sum(lengths), DIM, generator=generator, dtype=torch.float64)
    gaps = [torch.randint(1, 100_000, (length + 1,), generator=generator) for length in lengths]
    return x, torch.tensor([0, *lengths]).cumsum(0), torch.cat([gap.cumsum(0) for gap in gaps])


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def dense_attention(w: dict[str, Tensor], z: Tensor, i: int) -> Tensor:
    """The output of attention for token i of one sequence, whose normed tokens are ``z`` (L, d)."""
    projected = z @ w["qkv.weight"].T + w["qkv.bias"]
    heads = []
    for h in range(HEADS):
        q = projected[i, h * DQK : (h + 1) * DQK]
        k = projected[: i + 1, (HEADS + h) * DQK : (HEADS + h + 1) * DQK]
        v = projected[: i + 1, 2 * HEADS * DQK + h * DV : 2 * HEADS * DQK + (h + 1) * DV]
        heads.append(torch.softmax(k @ q / math.sqrt(DQK), 0) @ v)
    return w["output.weight"] @ torch.cat(heads) + w["output.bias"]


def scaled_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense_layer(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def dense_sasrec(w: dict[str, Tensor], x: Tensor, times: list[int]) -> Tensor:
    """One view of one sequence (L, d), token by token as in the paper's equations."""
    normed = torch.stack([scaled_norm(w, "attention_norm", t) for t in x])
    rows = []
    for i in range(len(x)):
        o = x[i] + dense_attention(w, normed, i)
        hidden = dense_layer(w, "ffn_in", scaled_norm(w, "ffn_norm", o)).clamp(min=0)
        rows.append(o + dense_layer(w, "ffn_out", hidden))
    return torch.stack(rows)


def dense_sasrec_norm_last(w: dict[str, Tensor], x: Tensor, times: list[int]) -> Tensor:
    rows = []
    for i in range(len(x)):
        o = scaled_norm(w, "attention_norm", x[i] + dense_attention(w, x, i))
        hidden = dense_layer(w, "ffn_in", o).clamp(min=0)
        rows.append(scaled_norm(w, "ffn_norm", o + dense_layer(w, "ffn_out", hidden)))
    return torch.stack(rows)


def dense_ligr(w: dict[str, Tensor], x: Tensor, times: list[int]) -> Tensor:
    normed = torch.stack([scaled_norm(w, "attention_norm", t) for t in x])
    rows = []
    for i in range(len(x)):
        o = x[i] + torch.sigmoid(dense_layer(w, "attention_gate", x[i])) * dense_attention(w, normed, i)
        inner = dense_layer(w, "ffn_in", scaled_norm(w, "ffn_norm", o))
        hidden = inner[:HIDDEN] * torch.sigmoid(inner[:HIDDEN]) * inner[HIDDEN:]
        rows.append(o + torch.sigmoid(dense_layer(w, "ffn_gate", o)) * dense_layer(w, "ffn_out", hidden))
    return torch.stack(rows)


def dense_hstu(w: dict[str, Tensor], x: Tensor, times: list[int]) -> Tensor:
    projected = torch.stack([layer_norm(t) for t in x]) @ w["uvqk"]
    projected = projected * torch.sigmoid(projected)
    u, v, q, k = projected.split([HEADS * DV, HEADS * DV, HEADS * DQK, HEADS * DQK], dim=1)
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(HEADS):
            total = torch.zeros(DV, dtype=x.dtype)
            for j in range(i + 1):
                bucket = min(int(math.log(max(abs(times[i + 1] - times[j]), 1)) / 0.301), 128)
                logit = q[i, h * DQK : (h + 1) * DQK] @ k[j, h * DQK : (h + 1) * DQK]
                logit = logit + w["ts_weights"][bucket] + w["pos_weights"][j - i + N - 1]
                total = total + logit * torch.sigmoid(logit) / N * v[j, h * DV : (h + 1) * DV]
            heads.append(total)
        rows.append(w["output.weight"] @ (u[i] * layer_norm(torch.cat(heads))) + w["output.bias"] + x[i])
    return torch.stack(rows)


DENSE = {
    "sasrec": dense_sasrec,
    "sasrec_norm_last": dense_sasrec_norm_last,
    "ligr": dense_ligr,
    "hstu": dense_hstu,
}


@pytest.mark.parametrize("kind", KINDS)
def test_block_and_all_gradients_equal_the_dense_definition(kind: str) -> None:
    block = make(kind)
    x, offsets, times = inputs(LENGTHS)
    x.requires_grad_()
    y, routing = block(x, offsets, times)
    assert routing is None
    direction = torch.randn_like(y)
    named: dict[str, Tensor] = dict(block.named_parameters())
    gradients = torch.autograd.grad(y, [x, *named.values()], direction)

    dense = DENSE[kind]
    parts = [
        torch.cat(
            [
                dense(named, x[view, start:end], times[start + b : end + b + 1].tolist())
                for b, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
                if end > start
            ]
        )
        for view in range(NUM_VIEWS)
    ]
    expected = torch.stack(parts)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad(expected, [x, *named.values()], direction)
    for name, got, want in zip(["x", *named], gradients, wanted, strict=True):
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()), msg=name)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation creates."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("kind", BASELINES)
def test_no_tensor_is_larger_than_the_scores_of_a_chunk(kind: str) -> None:
    lengths = [200] * 3
    blocks = {
        "sasrec": SASRecBlock(4, 2, 2, 2, 4),
        "ligr": LiGRBlock(4, 2, 2, 2, 4),
        "hstu": HSTUBlock(4, 200, 2, 2, 2),
    }
    block = blocks[kind]
    x = torch.randn(4, sum(lengths), 4, requires_grad=True)  # 8 groups of 3 sequences
    times = torch.arange(sum(lengths) + 3)
    with Largest() as largest:
        block(x, torch.tensor([0, *lengths]).cumsum(0), times)[0].sum().backward()
    assert len(lengths) < ROWS_AT_ONCE
    assert 200 * 200 <= largest.elements <= len(lengths) * 200 * 200


@pytest.mark.parametrize("kind", BASELINES)
def test_a_batch_without_tokens_and_dropout(kind: str) -> None:
    config = load_config(
        None, ["data.path=unused", f"model.block={kind}", "model.moe.num_experts=0", "model.dropout=0.5"]
    )
    model = Decoder(config)
    rows = torch.randn(4, 4, 16, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.arange(2)
    empty = model(rows, *nothing, dropout_keys=torch.arange(2)).hidden
    assert empty.shape == (0, 4, 16)
    empty.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    batch = rows, torch.tensor([0, 1, 2]), torch.tensor([0, 3]), torch.arange(4)
    first, again, other = (model(*batch, dropout_keys=torch.tensor([key])).hidden for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="dropout_keys are required in training with dropout"):
        model(*batch)
    model.eval()
    torch.testing.assert_close(model(*batch).hidden, model(*batch).hidden, rtol=0, atol=0)


def test_only_fuxi_blocks_have_experts() -> None:
    with pytest.raises(UserError, match=r"num_experts \(8\) must be 0 with model.block=hstu: only fuxi has experts"):
        load_config(None, ["data.path=unused", "model.block=hstu"])


def test_the_output_of_attention_has_dropout_only_if_it_is_asked_for() -> None:
    torch.manual_seed(1)
    x, offsets, times = inputs([5, 4])
    keys = torch.arange(NUM_VIEWS * 9).unflatten(0, (NUM_VIEWS, 9))
    outputs = []
    for has_dropout in (True, False):
        block = SASRecBlock(DIM, HEADS, DQK, DV, HIDDEN, 0.5, attention_output_dropout=has_dropout).double()
        with torch.no_grad():
            block.qkv.weight.zero_()  # equal values of 1 for all tokens, so that dropout of weights is seen apart
            block.qkv.bias.fill_(1.0)
            block.output.weight.fill_(1.0)
            block.ffn_out.weight.zero_()
        outputs.append((block(x, offsets, times, dropout_keys=keys)[0] - x).detach())
    dropped = (outputs[0] == 0).double().mean(-1)
    assert 0.2 < float(dropped.mean()) < 0.8  # the seed decides; half of the values on average
    without = outputs[1]
    torch.testing.assert_close(without, without[..., :1].expand_as(without))  # a whole token has one value


def test_final_norm_and_positions_from_the_newest_event() -> None:
    overrides = ["data.path=unused", "model.moe.num_experts=0", "data.max_seq_len=6", "model.num_blocks=1"]
    overrides += ["model.positions_from=newest", "model.final_norm=true"]
    model = Decoder(load_config(None, overrides)).eval()
    rows, items = torch.randn(4, 4, 16), torch.tensor([0, 1, 2, 3, 3])
    offsets, times = torch.tensor([0, 2, 5]), torch.arange(7)
    views = model.inputs(rows, items, offsets)
    places = torch.tensor([4, 5, 3, 4, 5])
    expected = 8.0 * rows[items].transpose(0, 1) + model.inputs.positions[:, places]
    torch.testing.assert_close(views, expected)
    hidden = model(rows, items, offsets, times).hidden
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(5, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(5, 4), atol=1e-2, rtol=0)
