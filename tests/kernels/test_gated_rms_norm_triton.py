"""The Triton form of the norms, on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gated_rms_norm, rms_norm
from kernels.splitmix import derive

pytest.importorskip("triton")
from kernels.gated_rms_norm.triton_form import norm_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW_PRECISION = [pytest.param(torch.float16, id="f16"), pytest.param(torch.bfloat16, id="bf16")]


def norm(
    u: Tensor | None, a: Tensor, dropout_p: float = 0.0, backend: str = "triton", keys: Tensor | None = None
) -> Tensor:
    options: dict[str, Any] = {"dropout_p": dropout_p, "dropout_keys": keys, "backend": backend}
    return rms_norm(a, **options) if u is None else gated_rms_norm(u, a, **options)


def row_keys(rows: int, seed: int = 5) -> Tensor:
    return derive(torch.arange(rows), seed).to(DEVICE)


def definition(u: Tensor | None, a: Tensor) -> Tensor:
    normed = a / torch.sqrt(a.square().mean(1, keepdim=True) + 1e-6)
    return normed if u is None else u * normed


def operands(rows: int, width: int, gated: bool = True, seed: int = 0) -> tuple[Tensor | None, Tensor, Tensor]:
    """u or None, a, and the upstream gradient: float32 numbers that are exact in float16 and bfloat16."""
    random = torch.Generator().manual_seed(seed)
    values = [torch.randn(rows, width, generator=random).bfloat16().half().float().to(DEVICE) for _ in range(3)]
    return (values[0] if gated else None), values[1], values[2]


def with_gradients(y: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def leaves(u: Tensor | None, a: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in (u, a) if x is not None]


def assert_agrees(u: Tensor | None, a: Tensor, upstream: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """Compares values and every gradient, without dropout, with float64."""
    results = []
    for form, kind in ((norm, dtype), (definition, torch.float64)):
        inputs = leaves(u, a, kind)
        gate = inputs[0] if u is not None else None
        results.append(with_gradients(form(gate, inputs[-1]), inputs, upstream))
    # d a is r (g ⊙ u − …). If the difference cancels, the rounding of its terms remains.
    terms = (upstream if u is None else upstream * u).double().abs().amax(1, keepdim=True)
    terms = terms / torch.sqrt(a.double().square().mean(1, keepdim=True) + 1e-6)
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == dtype
        band = terms if wanted is results[1][-1] else wanted.abs()
        assert ((found.double() - wanted).abs() <= tolerance * (band + wanted.abs())).all()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows, width", [(0, 8), (1, 8), (257, 8), (3, 1), (43, 50), (129, 16), (9, 192), (2, 2048)])
def test_edges(rows: int, width: int, gated: bool) -> None:
    assert_agrees(*operands(rows, width, gated), torch.float32, 3e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(0, 40), width=st.integers(1, 300), gated=st.booleans(), seed=st.integers(0, 1000))
def test_random_shapes(rows: int, width: int, gated: bool, seed: int) -> None:
    assert_agrees(*operands(rows, width, gated, seed), torch.float32, 3e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_rounds_its_results_alone(dtype: torch.dtype) -> None:
    assert_agrees(*operands(20, 50), dtype, torch.finfo(dtype).eps)


def test_rows_of_zeros_and_of_large_numbers() -> None:
    u, a, upstream = operands(3, 24)
    a[0] = 0
    a[1] = 60_000  # its square overflows float16
    assert_agrees(u, a, upstream, torch.float32, 3e-6)
    y = norm(torch.ones(1, 24, dtype=torch.float16, device=DEVICE), a[1:2].half())
    torch.testing.assert_close(y, torch.ones_like(y))


def test_operands_that_are_not_contiguous() -> None:
    u, a, upstream = operands(60, 60)
    assert u is not None
    assert_agrees(u[::2, ::3], a.t()[:30, 7:27], upstream[:30, 40:].as_strided((30, 20), (60, 1)), torch.float32, 3e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_dropout_replays_in_backward(gated: bool) -> None:
    u, a, upstream = operands(37, 50, gated)
    probability = 0.3
    scale = 65_536 / (65_536 - round(probability * 65_536))
    inputs = leaves(u, a, torch.float32)
    gate = inputs[0] if gated else None
    found = with_gradients(norm(gate, inputs[-1], probability, keys=row_keys(37)), inputs, upstream)
    mask = (found[0] != 0).double() * scale
    assert 0.6 < (mask != 0).double().mean().item() < 0.8
    exact = leaves(u, a, torch.float64)
    wanted = with_gradients(definition(exact[0] if gated else None, exact[-1]) * mask, exact, upstream)
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 8, 50, 192, 1000])
@pytest.mark.parametrize("probability", [0.2, 0.5, 0.999999])
def test_dropout_drops_the_same_elements_in_both_forms(width: int, probability: float) -> None:
    ones, keys = torch.ones(37, width, device=DEVICE), row_keys(37, width)
    masks = [norm(None, ones, probability, backend, keys) != 0 for backend in ("torch", "triton")]
    assert torch.equal(*masks)


def test_same_bits_whatever_rows_share_a_program() -> None:
    """The result and gradient of a row depend neither on the rows after it nor on the run."""
    u, a, upstream = operands(70, 48)
    assert u is not None
    results = []
    for rows in (70, 70, 33):
        inputs = leaves(u[:rows], a[:rows], torch.float32)
        y = norm(inputs[0], inputs[1], 0.25, keys=row_keys(rows))
        results.append([x[:33] for x in with_gradients(y, inputs, upstream[:rows])])
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], again, strict=True))


def test_custom_operator_passes_opcheck() -> None:
    u, a, _ = operands(5, 12)
    inputs = leaves(u, a, torch.float32)
    torch.library.opcheck(norm_op, (inputs[1], inputs[0], row_keys(5), 1e-6, 20_000))
    torch.library.opcheck(norm_op, (inputs[1], None, None, 1e-6, 0))


def test_keeps_the_inverse_norms_for_backward_and_no_mask() -> None:
    u, a, _ = operands(40, 64)
    inputs, keys = leaves(u, a, torch.float32), row_keys(40)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(inputs[0], inputs[1], 0.5, keys=keys)
    own = [x for x in saved if all(x.data_ptr() != given.data_ptr() for given in [*inputs, keys])]
    assert [(tuple(x.shape), x.dtype) for x in own] == [((40,), torch.float32)]


def test_float64_has_the_torch_form_alone() -> None:
    with pytest.raises(ValueError, match=r"a has dtype torch\.float64; the triton backend takes float32"):
        norm(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    assert norm(None, torch.ones(2, 3, dtype=torch.float64, device=DEVICE), backend="auto").dtype == torch.float64


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments_are_named(backend: str) -> None:
    x = torch.zeros(2, 3)
    options: dict[str, Any] = {"backend": backend}
    for match, call in (
        (r"u \(1, 3\) and a \(2, 3\) must have one shape", lambda: gated_rms_norm(x[:1], x, **options)),
        (r"u has dtype torch\.float16; a has torch\.float32", lambda: gated_rms_norm(x.half(), x, **options)),
        ("u is on meta; a is on cpu", lambda: gated_rms_norm(x.to("meta"), x, **options)),
        (r"x has shape \(3,\), expected \(R, w\)", lambda: rms_norm(x[0], **options)),
        (r"x has dtype torch\.int64", lambda: rms_norm(x.long(), **options)),
        (r"dropout_p \(-0\.1\) must be at least 0", lambda: rms_norm(x, dropout_p=-0.1, **options)),
        ("dropout_keys are required", lambda: rms_norm(x, dropout_p=0.1, **options)),
        (
            r"dropout_keys have shape \(3,\) and dtype torch\.int64 on cpu, expected \(2,\)",
            lambda: rms_norm(x, dropout_p=0.1, dropout_keys=torch.arange(3), **options),
        ),
        (r"eps \(-1\.0\) must not be negative", lambda: rms_norm(x, eps=-1.0, **options)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
