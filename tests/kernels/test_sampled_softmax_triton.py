"""The Triton form of sampled softmax, on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import sampled_softmax_loss
from kernels.sampled_softmax import triton_form
from kernels.sampled_softmax.torch_form import MASKED_LOGIT

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE, OFFSET = 0.3, 0.5


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    items: Tensor
    targets: Tensor
    negatives: Tensor
    upstream: Tensor
    group_size: int
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, hidden=self.hidden.to(dtype), items=self.items.to(dtype))


def make_case(tokens: int, items: int, negatives: int, group: int, width: int, seed: int = 0) -> Case:
    random = torch.Generator().manual_seed(seed)
    size = group or max(1, tokens)

    def unit(rows: int) -> Tensor:
        vectors = torch.randn(rows, width, generator=random)
        return torch.nn.functional.normalize(vectors).to(torch.float16).to(DEVICE, torch.float64)

    return Case(
        unit(tokens),
        unit(items),
        torch.randint(items, (tokens,), generator=random).to(DEVICE),
        torch.randint(items, (-(-tokens // size), negatives), generator=random).to(DEVICE),
        torch.randn(tokens, generator=random).to(DEVICE),
        group,
    )


def definition(case: Case, hidden: Tensor, items: Tensor) -> Tensor:
    tokens = len(hidden)
    own = case.negatives[torch.arange(tokens, device=DEVICE) // (case.group_size or max(1, tokens))]
    positive = (hidden * items[case.targets]).sum(1, keepdim=True) / TEMPERATURE
    negative = torch.einsum("td,tnd->tn", hidden, items[own]) / TEMPERATURE + OFFSET
    if case.bias is not None:
        negative = negative + case.bias.to(negative.dtype)[own]
    negative = negative.masked_fill(own == case.targets[:, None], MASKED_LOGIT)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return -torch.log_softmax(torch.cat([positive, negative], 1).to(wide), 1)[:, 0]


def by_triton(case: Case, hidden: Tensor, items: Tensor) -> Tensor:
    return sampled_softmax_loss(
        hidden,
        items,
        case.targets,
        case.negatives,
        group_size=case.group_size,
        temperature=TEMPERATURE,
        logit_offset=OFFSET,
        item_bias=case.bias,
        backend="triton",
    )


def results(form: Callable[[Case, Tensor, Tensor], Tensor], case: Case) -> list[Tensor]:
    """Losses, d hidden, d items."""
    leaves = [case.hidden.detach().requires_grad_(), case.items.detach().requires_grad_()]
    loss = form(case, *leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, case.upstream.to(loss.dtype))]


def assert_agrees(case: Case) -> None:
    expected = results(definition, case)
    found = results(by_triton, case.to(torch.float32))
    for name, value, wanted in zip(("loss", "d hidden", "d items"), found, expected, strict=True):
        assert value.dtype == torch.float32
        error = (value.double() - wanted).abs().max().item() if wanted.numel() else 0.0
        assert error <= 2e-5, name


EDGES = {  # tokens, items, negatives, group size, width
    "no token": (0, 3, 4, 1, 8),
    "no token, one group": (0, 3, 4, 0, 8),
    "one item, all negatives are the target": (9, 1, 5, 1, 8),
    "one item, shared": (17, 1, 5, 0, 8),
    "one token": (1, 5, 3, 0, 16),
    "no negatives": (3, 4, 0, 1, 8),
    "no negatives, shared": (20, 4, 0, 16, 8),
    "more negatives than a tile": (3, 30, 150, 1, 50),
    "wide": (3, 7, 9, 1, 300),
    "groups too small for tiles": (7, 9, 5, 3, 20),
    "tile and tile + 1": (65, 30, 65, 64, 64),
    "last group short": (41, 12, 33, 16, 33),
    "group larger than a tile": (150, 20, 40, 70, 24),
    "group larger than the batch": (20, 9, 6, 700, 24),
    "all share": (130, 40, 20, 0, 50),
    "wide, shared": (33, 12, 35, 17, 260),
    "wide columns, shared": (34, 12, 70, 0, 130),
}


@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES)
def test_edges(shape: tuple[int, int, int, int, int]) -> None:
    assert_agrees(make_case(*shape))


@pytest.mark.parametrize("group", [1, 16, 0])
def test_items_have_biases_of_their_own(group: int) -> None:
    case = make_case(40, 12, 33, group, 24)
    assert_agrees(replace(case, bias=torch.randn(12, device=DEVICE)))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(0, 40),
    items=st.integers(1, 30),
    negatives=st.integers(1, 40),
    group=st.sampled_from([0, 1, 3, 8, 16]),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_random_shapes(tokens: int, items: int, negatives: int, group: int, width: int, seed: int) -> None:
    assert_agrees(make_case(tokens, items, negatives, group, width, seed))


@pytest.mark.parametrize("group", [1, 16])
def test_items_gradient_in_parts(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes, several pieces and several splits of the tokens give the same results."""
    monkeypatch.setattr(triton_form, "ENTRIES_AT_ONCE", 16 * 6)
    monkeypatch.setattr(triton_form, "PARTIAL_FLOATS_AT_ONCE", 1)
    monkeypatch.setattr(triton_form, "PIECE", 16)
    assert_agrees(make_case(40, 2, 5, group, 8))
    assert_agrees(make_case(150, 3, 5, 0 if group > 1 else 1, 8))


@pytest.mark.parametrize("num_items", [3, 32767, 32768, 40000])
def test_entries_stand_by_item_in_their_order(num_items: int) -> None:
    rows = torch.tensor([[num_items - 1, 2, 0], [2, 2, num_items - 1]], device=DEVICE)
    order, starts = triton_form._sort_by_item(rows, num_items)
    items = rows.flatten().tolist()
    assert order.tolist() == sorted(range(6), key=lambda position: items[position])
    assert starts.tolist() == [sum(item < bound for item in items) for bound in range(num_items + 1)]


LOW_PRECISION = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="f16")]


@pytest.mark.parametrize("group", [1, 0])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(dtype: torch.dtype, group: int) -> None:
    """The error is within twice that of the definition computed in the same dtype plus one rounding of the output."""
    case = make_case(40, 30, 20, group, 24)
    case = case.to(dtype).to(torch.float64)
    exact = results(definition, case)
    eager = results(definition, case.to(dtype))
    for value, limit, wanted in zip(results(by_triton, case.to(dtype)), eager, exact, strict=True):
        norm = wanted.norm().item()
        error, allowed = (value.double() - wanted).norm().item(), (limit.double() - wanted).norm().item()
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * norm)


@pytest.mark.parametrize("group", [1, 0])
def test_repeats_bit_for_bit_and_takes_strides(group: int) -> None:
    case = make_case(70, 5, 12, group, 20).to(torch.float32)
    strided = replace(case, hidden=case.hidden.T.contiguous().T, items=case.items.T.contiguous().T)
    first, second = results(by_triton, case), results(by_triton, strided)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("group", [1, 8])
def test_custom_operator_passes_opcheck(group: int) -> None:
    case = replace(make_case(10, 5, 4, group, 6).to(torch.float32), bias=torch.randn(5, device=DEVICE))
    leaves = [case.hidden.requires_grad_(), case.items.requires_grad_()]
    arguments = (*leaves, case.targets, case.negatives, case.bias, group, TEMPERATURE, OFFSET)
    torch.library.opcheck(triton_form.loss_op, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments_are_named(backend: str) -> None:
    case = make_case(3, 4, 5, 1, 6).to(torch.float32)
    good = {"hidden": case.hidden, "items": case.items, "targets": case.targets, "negatives": case.negatives}
    wrong: dict[str, dict[str, Any]] = {
        r"hidden must be floating and \(T, D\)": {"hidden": case.hidden[0]},
        r"items has shape \(4, 5\), expected \(U, 6\)": {"items": case.items[:, :5]},
        r"items has dtype torch\.float16": {"items": case.items.half()},
        r"targets has shape \(2,\), expected \(3,\)": {"targets": case.targets[:2]},
        r"targets has dtype torch\.int32": {"targets": case.targets.int()},
        r"negatives has dtype torch\.int32": {"negatives": case.negatives.int()},
        r"negatives has shape \(3, 5\), expected \(2, n\)": {"group_size": 2},
        r"group_size \(-1\)": {"group_size": -1},
        r"temperature \(0\.0\) must be above 0": {"temperature": 0.0},
        r"targets is on meta": {"targets": case.targets.to("meta")},
        r"item_bias has shape \(3,\)": {"item_bias": torch.zeros(3, device=DEVICE)},
    }
    if DEVICE.type == "cpu":  # where reading the rows waits for nothing
        wrong[r"targets names rows from 4 to 4; items has 4"] = {"targets": torch.full((3,), 4)}
        wrong[r"negatives names rows from -1 to -1; items has 4"] = {"negatives": torch.full((3, 5), -1)}
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            sampled_softmax_loss(**(good | change), backend=backend)


def test_what_the_triton_form_alone_refuses() -> None:
    case = make_case(3, 4, 5, 1, 6)
    with pytest.raises(ValueError, match=r"hidden has dtype torch\.float64; the triton backend takes float32"):
        results(by_triton, case)
    with pytest.raises(ValueError, match="hidden has width 513"):
        by_triton(case, torch.zeros(3, 513, device=DEVICE), torch.zeros(4, 513, device=DEVICE))
