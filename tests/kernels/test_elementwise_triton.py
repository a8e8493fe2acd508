"""The Triton forms of the norms and of silu_split, on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gated_rms_norm, rms_norm, silu_split
from kernels.gated_rms_norm.triton_form import norm_op
from kernels.silu_split.triton_form import silu_split_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Form = Callable[..., tuple[Tensor, ...]]


def outputs_and_gradients(form: Form, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    outputs = form(*leaves)
    random = torch.Generator().manual_seed(3)
    upstream = [torch.randn(y.shape, generator=random, dtype=torch.float64).to(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_near(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for value, right in zip(found, exact, strict=True):
        assert value.shape == right.shape
        error = (value.double() - right).norm() / right.norm().clamp(min=1e-30)
        assert error <= tolerance, error


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def norms(backend: str) -> dict[str, Form]:
    return {
        "gated": lambda u, a: (gated_rms_norm(u, a, backend=backend),),
        "plain": lambda a: (rms_norm(a, backend=backend),),
    }


@pytest.mark.parametrize("rows, width", [(0, 8), (1, 16), (70, 50), (129, 16), (5, 300), (3, 2048)])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_norm(kind: str, rows: int, width: int) -> None:
    inputs = [normal(rows, width), 3 * normal(rows, width) + 1][: 2 if kind == "gated" else 1]
    exact = outputs_and_gradients(norms("torch")[kind], inputs, torch.float64)
    assert_near(outputs_and_gradients(norms("triton")[kind], inputs, torch.float32), exact, 1e-6)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(0, 200), width=st.integers(2, 90))
def test_norm_of_random_shapes(rows: int, width: int) -> None:
    inputs = [normal(rows, width), normal(rows, width)]
    exact = outputs_and_gradients(norms("torch")["gated"], inputs, torch.float64)
    assert_near(outputs_and_gradients(norms("triton")["gated"], inputs, torch.float32), exact, 1e-5)


def test_norm_of_rows_that_are_views() -> None:
    wide = torch.randn(6, 40, device=DEVICE)
    u, a = wide[:, :20], wide[:, 20:]
    expected = gated_rms_norm(u, a, backend="torch")
    torch.testing.assert_close(gated_rms_norm(u, a, backend="triton"), expected)


def test_low_precision_is_rounded_once() -> None:
    inputs = [normal(40, 24).half(), normal(40, 24).half()]
    exact = outputs_and_gradients(norms("torch")["gated"], [x.double() for x in inputs], torch.float64)
    assert_near(outputs_and_gradients(norms("triton")["gated"], inputs, torch.float16), exact, 5e-4)


@pytest.mark.parametrize("width", [16, 50])
def test_dropout_replays_in_backward(width: int) -> None:
    """What was dropped has no gradient, and what stayed has that of the undropped norm, scaled."""
    u, a = (x.to(DEVICE, torch.float32).requires_grad_() for x in (normal(300, width), normal(300, width) + 1))
    torch.manual_seed(5)
    y = gated_rms_norm(u, a, dropout_p=0.3, backend="triton")
    torch.manual_seed(5)
    assert torch.equal(gated_rms_norm(u, a, dropout_p=0.3, backend="triton"), y)
    assert not torch.equal(gated_rms_norm(u, a, dropout_p=0.3, backend="triton"), y)
    stays = y != 0
    share = stays.double().mean().item()
    assert share == pytest.approx(0.7, abs=4 * (0.21 / y.numel()) ** 0.5)
    scale = 65_536 / (65_536 - round(0.3 * 65_536))
    plain = gated_rms_norm(u, a, backend="triton")
    torch.testing.assert_close(y, plain * stays * scale)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(plain, (u, a), upstream * stays * scale)
    for found, wanted in zip(torch.autograd.grad(y, (u, a), upstream), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_dropout_draws_every_element_for_itself() -> None:
    """No two rows, and no two columns, share their draws; each is kept as often as the others."""
    stays = rms_norm(torch.ones(2000, 64, device=DEVICE), dropout_p=0.5, backend="triton").cpu() != 0
    centred = stays.double() * 2 - 1
    between_columns = centred.T @ centred / 2000 - torch.eye(64)
    assert between_columns.abs().max() < 6 / 2000**0.5
    between_rows = centred @ centred.T / 64
    assert (between_rows - torch.eye(2000)).abs().max() < 0.9
    assert stays.double().mean(0).sub(0.5).abs().max() < 6 * 0.5 / 2000**0.5


@pytest.mark.parametrize(
    "views, tokens, heads, dv, dqk",
    [(1, 5, 1, 4, 4), (3, 70, 2, 5, 3), (2, 0, 1, 4, 4), (4, 33, 1, 16, 16), (1, 1, 3, 64, 8)],
)
def test_silu_split(views: int, tokens: int, heads: int, dv: int, dqk: int) -> None:
    def form(backend: str) -> Form:
        return lambda projected: silu_split(projected, views, heads, dv, dqk, backend=backend)

    inputs = [normal(views * tokens, heads * (4 * dv + 2 * dqk))]
    exact = outputs_and_gradients(form("torch"), inputs, torch.float64)
    assert_near(outputs_and_gradients(form("triton"), inputs, torch.float32), exact, 1e-6)
    assert_near(outputs_and_gradients(form("triton"), inputs, torch.float16), exact, 2e-3)


def test_silu_split_with_a_part_unused() -> None:
    projected = normal(6, 12).to(DEVICE, torch.float32).requires_grad_()
    found, expected = (
        torch.autograd.grad(silu_split(projected, 2, 1, 2, 2, backend=backend)[1].sum(), projected)[0]
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(found, expected)


def test_custom_operators_pass_opcheck() -> None:
    a, u = (torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.randint(100, (1,), device=DEVICE)
    torch.library.opcheck(norm_op, (a, u, seed, 1e-6, 20_000))
    torch.library.opcheck(norm_op, (a, None, None, 1e-6, 0))
    projected = torch.randn(4, 12, device=DEVICE, requires_grad=True)
    torch.library.opcheck(silu_split_op, (projected, 2, 1, 2, 2))


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"u has dtype torch\.float16; a has torch\.float32"):
        gated_rms_norm(x.half(), x)
    with pytest.raises(ValueError, match="u is on meta"):
        gated_rms_norm(x.to("meta"), x)
    with pytest.raises(ValueError, match=r"x has shape \(4,\)"):
        rms_norm(x[0])
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        rms_norm(x.long())
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; the triton backend"):
        rms_norm(x.double(), backend="triton")
    with pytest.raises(ValueError, match=r"projected has shape \(3, 4\), expected \(2 views · T, 12\)"):
        silu_split(x, 2, 1, 2, 2)
