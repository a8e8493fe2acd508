"""Both forms of the split SiLU; Triton runs on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import silu_split

pytest.importorskip("triton")
from kernels.silu_split.triton_form import silu_split_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def definition(projected: Tensor, views: int, heads: int, dv: int, dqk: int) -> list[Tensor]:
    """The definition by shapes: (view, token, columns) → (view, head, token, width)."""
    active = (projected * torch.sigmoid(projected)).unflatten(0, (views, -1))
    results, start = [active[..., : 3 * heads * dv].flatten(0, 1)], 3 * heads * dv
    for width in (dv, dqk, dqk):
        pieces = [active[..., start + h * width : start + (h + 1) * width] for h in range(heads)]
        results.append(torch.stack(pieces, 1).flatten(0, 1))
        start += heads * width
    return results


def operands(views: int, tokens: int, heads: int, dv: int, dqk: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The projection and the upstream gradients of u, v, q and k, in numbers that are exact in float16 and bfloat16."""
    random = torch.Generator().manual_seed(seed)
    rows, groups = views * tokens, views * heads
    shapes = [(rows, 3 * heads * dv), (groups, tokens, dv), (groups, tokens, dqk), (groups, tokens, dqk)]
    projected = 3 * torch.randn(rows, heads * (4 * dv + 2 * dqk), generator=random)
    values = [projected, *(torch.randn(shape, generator=random) for shape in shapes)]
    projected, *upstream = (value.bfloat16().half().float().to(DEVICE) for value in values)
    return projected, upstream


def assert_agrees(
    projected: Tensor, upstream: list[Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    exact = projected.double().requires_grad_()
    outputs = definition(exact, *shape)
    wanted = [*outputs, *torch.autograd.grad(outputs, exact, [x.double() for x in upstream])]
    for backend in ("triton", "torch"):
        given = projected.to(dtype).requires_grad_()
        results = silu_split(given, *shape, backend=backend)
        found = [*results, *torch.autograd.grad(results, given, [x.to(dtype) for x in upstream])]
        for value, expected in zip(found, wanted, strict=True):
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


EDGES = [(1, 1, 1, 1, 1), (2, 0, 2, 8, 8), (4, 33, 1, 16, 16), (1, 70, 1, 50, 50), (2, 5, 3, 8, 40), (1, 3, 2, 256, 64)]


@pytest.mark.parametrize("views, tokens, heads, dv, dqk", EDGES)
def test_edges(views: int, tokens: int, heads: int, dv: int, dqk: int) -> None:
    assert_agrees(*operands(views, tokens, heads, dv, dqk), (views, heads, dv, dqk), torch.float32, 2e-6)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    views=st.integers(1, 3),
    tokens=st.integers(0, 20),
    heads=st.integers(1, 3),
    dv=st.integers(1, 70),
    dqk=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_random_shapes(views: int, tokens: int, heads: int, dv: int, dqk: int, seed: int) -> None:
    assert_agrees(*operands(views, tokens, heads, dv, dqk, seed), (views, heads, dv, dqk), torch.float32, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_low_precision(dtype: torch.dtype) -> None:
    assert_agrees(*operands(2, 20, 2, 8, 12), (2, 2, 8, 12), dtype, 2 * torch.finfo(dtype).eps)


def test_far_from_zero_and_an_operand_that_is_not_contiguous() -> None:
    projected, upstream = operands(2, 9, 1, 8, 8)
    projected[0] = torch.linspace(-200, 200, projected.shape[1], device=DEVICE)
    assert_agrees(projected.t().contiguous().t(), upstream, (2, 1, 8, 8), torch.float32, 3e-6)


def test_outputs_without_a_gradient() -> None:
    projected, _ = operands(2, 6, 1, 8, 8)
    gradients = []
    for backend in ("triton", "torch"):
        given = projected.clone().requires_grad_()
        _, _, q, _ = silu_split(given, 2, 1, 8, 8, backend=backend)
        gradients.append(torch.autograd.grad(q.sum(), given)[0])
    torch.testing.assert_close(*gradients)


def test_the_torch_form_has_the_bits_of_the_plain_operations() -> None:
    projected, upstream = operands(2, 31, 2, 8, 12)
    given, plain = projected.clone().requires_grad_(), projected.clone().requires_grad_()
    found = silu_split(given, 2, 2, 8, 12, backend="torch")
    u, *others = F.silu(plain).split([48, 16, 24, 24], dim=1)
    wanted = [u, *(x.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1) for x in others)]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    d_given, d_plain = torch.autograd.grad(found, given, upstream), torch.autograd.grad(wanted, plain, upstream)
    assert torch.equal(d_given[0], d_plain[0])


def test_same_bits_from_run_to_run() -> None:
    projected, upstream = operands(2, 40, 2, 16, 16)
    runs = []
    for _ in range(2):
        given = projected.clone().requires_grad_()
        results = silu_split(given, 2, 2, 16, 16, backend="triton")
        runs.append([*results, *torch.autograd.grad(results, given, upstream)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_custom_operator_passes_opcheck() -> None:
    projected, _ = operands(2, 3, 2, 4, 5)
    torch.library.opcheck(silu_split_op, (projected.requires_grad_(), 2, 2, 4, 5))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments_are_named(backend: str) -> None:
    projected = torch.zeros(3, 4, device=DEVICE)
    for message, arguments in {
        r"projected has shape \(3, 4\), expected \(2 views · T, 12\)": (projected, 2, 1, 2, 2),
        r"projected has dtype torch\.int64": (projected.long(), 1, 1, 2, 2),
        r"num_views \(0\) must be at least 1": (projected, 0, 1, 2, 2),
        r"dqk \(-2\) must be at least 1": (projected, 1, 1, 2, -2),
    }.items():
        with pytest.raises(ValueError, match=message):
            silu_split(*arguments, backend=backend)
