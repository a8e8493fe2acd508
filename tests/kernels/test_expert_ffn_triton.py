"""The Triton form of the expert FFN, on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import expert_ffn, routed_expert_ffn
from kernels.expert_ffn.triton_form import expert_ffn_op, routed_expert_ffn_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW_PRECISION = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="f16")]

EDGES = {
    "no row": ([0, 0], 4, 4),
    "no hidden unit": ([3], 4, 0),
    "empty first and last, one row": ([0, 1, 0], 8, 20),
    "block and block ± 1": ([127, 128, 129], 16, 16),
    "one giant among dwarfs": ([1, 400, 0, 2], 16, 20),
    "width that is no power of two": ([9, 4], 50, 33),
    "one column": ([5], 1, 1),
    "backward in two passes": ([3, 8], 200, 17),
    "two passes": ([20, 0, 3], 260, 33),
}


def make_inputs(counts: list[int], dim: int, hidden_dim: int) -> tuple[Tensor, list[Tensor]]:
    """Offsets, and x, w1, w3, w2 in float64."""
    random = torch.Generator().manual_seed(sum(counts) + dim)
    num_experts = len(counts)
    shapes = [(sum(counts), dim), *[(num_experts, dim, hidden_dim)] * 2, (num_experts, hidden_dim, dim)]
    scales = (1.0, dim**-0.5, dim**-0.5, max(1, hidden_dim) ** -0.5)
    operands = [
        scale * torch.randn(*shape, generator=random, dtype=torch.float64)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return torch.tensor([0, *counts]).cumsum(0).to(DEVICE), [operand.to(DEVICE) for operand in operands]


def results(
    offsets: Tensor, operands: list[Tensor], dtype: torch.dtype, backend: str, upstream_sizes: bool = False
) -> list[Tensor]:
    """y and the gradients of x, w1, w3 and w2."""
    leaves = [operand.to(dtype).requires_grad_() for operand in operands]
    y = expert_ffn(leaves[0], offsets, *leaves[1:], backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y, upstream_sizes))]


def upstream(y: Tensor, sizes: bool) -> Tensor:
    """The upstream gradient, the same for every dtype; ``sizes``: its absolute values."""
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return values.abs() if sizes else values


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((value.double() - right).norm() / right.norm().clamp(min=1e-30)).item()
        for value, right in zip(found, exact, strict=True)
    ]


def assert_exact(counts: list[int], dim: int, hidden_dim: int, tolerance: float = 1e-6) -> None:
    offsets, operands = make_inputs(counts, dim, hidden_dim)
    exact = results(offsets, operands, torch.float64, "torch")
    errors = relative_errors(results(offsets, operands, torch.float32, "triton"), exact)
    terms = results(offsets, [operand.abs() for operand in operands], torch.float64, "torch", upstream_sizes=True)
    check_within(tolerance, errors, exact, terms)


def check_within(tolerance: float, errors: list[float], exact: list[Tensor], terms: list[Tensor]) -> None:
    """Errors relative to the result or, if its ``terms`` cancel to less, to a tenth of the sum of their sizes."""
    for error, value, sizes in zip(errors, exact, terms, strict=True):
        share = (value.norm() / sizes.norm().clamp(min=1e-30)).item()
        assert error * min(1.0, 10 * share) < tolerance, errors


@pytest.mark.parametrize("counts, dim, hidden_dim", EDGES.values(), ids=EDGES)
def test_edges(products: float, counts: list[int], dim: int, hidden_dim: int) -> None:
    assert_exact(counts, dim, hidden_dim, max(1e-6, products))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    counts=st.lists(st.integers(0, 150), min_size=1, max_size=5), dim=st.integers(1, 70), hidden_dim=st.integers(1, 90)
)
def test_random_shapes(counts: list[int], dim: int, hidden_dim: int) -> None:
    assert_exact(counts, dim, hidden_dim)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("dim", [16, 300])
def test_low_precision(dtype: torch.dtype, dim: int) -> None:
    """The error is within that of the definition computed in the same dtype plus one rounding of the output."""
    offsets, operands = make_inputs([40, 9], dim, 48)
    operands = [operand.to(dtype).double() for operand in operands]
    exact = results(offsets, operands, torch.float64, "torch")
    eager = relative_errors(results(offsets, operands, dtype, "torch"), exact)
    found = relative_errors(results(offsets, operands, dtype, "triton"), exact)
    assert all(error <= limit + torch.finfo(dtype).eps for error, limit in zip(found, eager, strict=True)), found


@pytest.mark.parametrize("dim", [16, 260])
def test_repeats_bit_for_bit(dim: int) -> None:
    offsets, operands = make_inputs([300, 0, 70], dim, 32)
    first, second = (results(offsets, operands, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_element_is_written_and_rows_of_other_experts_stay_apart() -> None:
    """An expert whose weights are not finite affects only its own rows and gradients."""
    offsets, operands = make_inputs([5, 6, 7], 8, 12)
    clean = results(offsets, operands, torch.float32, "triton")
    operands[1][1] = float("nan")
    spoilt = results(offsets, operands, torch.float32, "triton")
    for value, expected, bad in zip(spoilt, clean, [slice(5, 11), slice(5, 11), *[slice(1, 2)] * 3], strict=True):
        assert value[bad].isnan().any()
        value[bad] = expected[bad]
        assert torch.equal(value, expected)


def routed_inputs(rows: int, top_k: int, num_experts: int, dim: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Order and offsets of random choices, and x, choice weights, w1, w3, w2 in float64."""
    random = torch.Generator().manual_seed(rows + dim)
    choices = torch.rand(rows, num_experts, generator=random).topk(top_k).indices.flatten().to(DEVICE)
    weights = torch.rand(rows, top_k, generator=random, dtype=torch.float64).to(DEVICE)
    counts = torch.bincount(choices, minlength=num_experts).tolist()
    offsets, (_, *factors) = make_inputs(counts, dim, 24)
    x = torch.randn(rows, dim, generator=random, dtype=torch.float64).to(DEVICE)
    return torch.argsort(choices, stable=True), offsets, [x, weights, *factors]


def routed_results(
    order: Tensor,
    offsets: Tensor,
    operands: list[Tensor],
    dtype: torch.dtype,
    backend: str,
    upstream_sizes: bool = False,
) -> list[Tensor]:
    """y and the gradients of x, the choices' weights, w1, w3 and w2."""
    leaves = [operand.to(dtype).requires_grad_() for operand in operands]
    x, weights, *factors = leaves
    y = routed_expert_ffn(x, order, weights, offsets, *factors, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y, upstream_sizes))]


@pytest.mark.parametrize("rows, top_k, dim", [(0, 1, 4), (1, 1, 8), (70, 2, 50), (150, 3, 16), (9, 2, 270)])
def test_routed_ffn(rows: int, top_k: int, dim: int) -> None:
    order, offsets, operands = routed_inputs(rows, top_k, 5, dim)
    exact = routed_results(order, offsets, operands, torch.float64, "torch")
    found = routed_results(order, offsets, operands, torch.float32, "triton")
    assert max(relative_errors(found, exact)) < 1e-6
    again = routed_results(order, offsets, operands, torch.float32, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(0, 60), top_k=st.integers(1, 4), experts=st.integers(4, 9), dim=st.integers(1, 70))
def test_random_routes(rows: int, top_k: int, experts: int, dim: int) -> None:
    order, offsets, operands = routed_inputs(rows, top_k, experts, dim)
    exact = routed_results(order, offsets, operands, torch.float64, "torch")
    errors = relative_errors(routed_results(order, offsets, operands, torch.float32, "triton"), exact)
    terms = routed_results(order, offsets, [x.abs() for x in operands], torch.float64, "torch", upstream_sizes=True)
    check_within(1e-6, errors, exact, terms)


def test_routed_ffn_is_the_weighted_sum_of_its_experts() -> None:
    order, offsets, (x, weights, w1, w3, w2) = routed_inputs(6, 2, 3, 4)
    expert = torch.searchsorted(offsets, torch.arange(12, device=DEVICE), right=True) - 1
    expected = torch.zeros_like(x)
    for slot, choice in enumerate(order.tolist()):
        row, j = divmod(choice, 2)
        e = int(expert[slot])
        expected[row] += weights[row, j] * ((F.silu(x[row] @ w1[e]) * (x[row] @ w3[e])) @ w2[e])
    torch.testing.assert_close(routed_expert_ffn(x, order, weights, offsets, w1, w3, w2, backend="torch"), expected)


def test_custom_operator_passes_opcheck() -> None:
    offsets, operands = make_inputs([3, 0, 2], 4, 5)
    x, w1, w3, w2 = (operand.float().requires_grad_() for operand in operands)
    torch.library.opcheck(expert_ffn_op, (x, offsets, w1, w3, w2))
    order, offsets, operands = routed_inputs(3, 2, 3, 4)
    x, weights, w1, w3, w2 = (operand.float().requires_grad_() for operand in operands)
    torch.library.opcheck(routed_expert_ffn_op, (x, order, weights, offsets, w1, w3, w2))


def test_compiles_without_a_graph_break() -> None:
    offsets, operands = make_inputs([3, 4], 4, 5)
    x, w1, w3, w2 = (operand.float() for operand in operands)

    def ffn(x: Tensor) -> Tensor:
        return expert_ffn(x, offsets, w1, w3, w2, backend="triton") + F.silu(x)

    torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), ffn(x))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(3)}, r"x must be floating and \(R, d\)"),
        ({"expert_offsets": torch.tensor([0, 1, 3], dtype=torch.int32)}, "expert_offsets must be int64"),
        ({"expert_offsets": torch.tensor([0, 2, 2])}, "expert_offsets runs from 0 to 2; expected from 0 to the 3 rows"),
        ({"expert_offsets": torch.tensor([0, 4, 3])}, "expert_offsets must not decrease"),
        ({"w1": torch.zeros(2, 5, 5)}, r"w1 has shape \(2, 5, 5\), expected \(2, 4, f\)"),
        ({"w3": torch.zeros(2, 4, 6)}, "w3 has shape"),
        ({"w2": torch.zeros(2, 4, 5)}, r"w2 has shape \(2, 4, 5\), expected \(2, 5, 4\)"),
        ({"w3": torch.zeros(2, 4, 5, dtype=torch.float16)}, r"w3 has dtype torch\.float16; x has torch\.float32"),
        ({"w2": torch.zeros(2, 5, 4, device="meta")}, "w2 is on meta"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments_are_named(backend: str, changes: dict[str, Tensor], message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 4),
        "expert_offsets": torch.tensor([0, 1, 3]),
        "w1": torch.zeros(2, 4, 5),
        "w3": torch.zeros(2, 4, 5),
        "w2": torch.zeros(2, 5, 4),
    }
    changed = {name: tensor if tensor.is_meta else tensor.to(DEVICE) for name, tensor in (arguments | changes).items()}
    with pytest.raises(ValueError, match=message):
        expert_ffn(**changed, backend=backend)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("choice_weights", lambda x: x[:2], r"choice_weights has shape \(2, 2\), expected \(3, k\)"),
        ("choice_weights", lambda x: x.long(), r"choice_weights has dtype torch\.int64"),
        ("choice_weights", lambda x: x.to("meta"), "choice_weights is on meta"),
        ("order", lambda x: x[:5], r"order must be int64 and \(6,\)"),
        ("order", lambda x: x.int(), r"order must be int64 and \(6,\)"),
        ("order", lambda x: x.to("meta"), "order is on meta"),
        ("order", lambda x: x.clamp(min=1), "order must hold each of the 6 choices once"),
        ("order", lambda x: x + 1, "order must hold each of the 6 choices once"),
        ("expert_offsets", lambda x: x + 1, "expert_offsets runs from 1 to 7; expected from 0 to the 6 rows"),
        ("w1", lambda x: x[:, :3], "w1 has shape"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_routing_is_named(backend: str, name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    order, offsets, (x, weights, *factors) = routed_inputs(3, 2, 3, 4)
    arguments = {"x": x.float(), "order": order, "choice_weights": weights, "expert_offsets": offsets}
    arguments |= {key: factor.float() for key, factor in zip(("w1", "w3", "w2"), factors, strict=True)}
    with pytest.raises(ValueError, match=message):
        routed_expert_ffn(**(arguments | {name: change(arguments[name])}), backend=backend)


def test_more_slots_than_int32_numbers_are_refused() -> None:
    x = torch.zeros(1, 4, device=DEVICE).expand(2**31, 4)
    offsets = torch.tensor([0, 2**31], device=DEVICE)
    weight = torch.zeros(1, 4, 4, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"x has 2147483648 rows or choices; the triton backend takes fewer than 2\*\*31"
    ):
        expert_ffn(x, offsets, weight, weight, weight, backend="triton")


def test_float64_runs_in_pytorch_unless_triton_is_named() -> None:
    offsets, (x, w1, w3, w2) = make_inputs([3, 4], 4, 5)
    assert expert_ffn(x, offsets, w1, w3, w2).dtype == torch.float64
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; the triton backend takes float32"):
        expert_ffn(x, offsets, w1, w3, w2, backend="triton")
