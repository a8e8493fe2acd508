"""torch.compile and torch.export work with every public function on both backends; operators launch on their tensors' device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Call(torch.nn.Module):
    """One public function, whose results are a tuple, whatever their number."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        results = self.function(*arguments, **self.options)
        return (results,) if isinstance(results, Tensor) else results


def attention(tokens: int) -> list[Any]:
    offsets, longest = torch.tensor([0, 3, 3, tokens]), 24
    times = 1_500_000_000 + 100 * torch.arange(tokens + 3)
    q, k, v = torch.randn(2, tokens, 4), torch.randn(2, tokens, 4), torch.randn(2, tokens, 5)
    return [q, k, v, offsets, longest, times, torch.randn(129), torch.randn(2 * longest - 1)]


def experts(rows: int) -> list[Any]:
    return [
        torch.randn(rows, 4), torch.tensor([0, 2, 2, rows]), torch.randn(3, 4, 6), torch.randn(3, 4, 6),
        torch.randn(3, 6, 4),
    ]  # fmt: skip


def routed(rows: int) -> list[Any]:
    _, _, *weights = experts(rows)
    order = torch.randperm(2 * rows)
    return [torch.randn(rows, 4), order, torch.rand(rows, 2), torch.tensor([0, 2, 2, 2 * rows]), *weights]


def loss(groups: Callable[[int], int]) -> Callable[[int], list[Any]]:
    def arguments(tokens: int) -> list[Any]:
        drawn = torch.randint(9, (groups(tokens), 5))
        return [torch.randn(tokens, 4), torch.randn(9, 4), torch.randint(9, (tokens,)), drawn]

    return arguments


# A public function, its options, and its arguments for a number of tokens or rows.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[int], list[Any]]]] = {
    "relative_attention": (kernels.relative_attention, {}, attention),
    "expert_ffn": (kernels.expert_ffn, {}, experts),
    "routed_expert_ffn": (kernels.routed_expert_ffn, {}, routed),
    "rms_norm": (
        lambda x, keys, **options: kernels.rms_norm(x, dropout_p=0.3, dropout_keys=keys, **options), {},
        lambda rows: [torch.randn(rows, 8), torch.arange(rows)],
    ),
    "gated_rms_norm": (
        lambda u, a, keys, **options: kernels.gated_rms_norm(u, a, dropout_p=0.3, dropout_keys=keys, **options), {},
        lambda rows: [torch.randn(rows, 8), torch.randn(rows, 8), torch.arange(rows)],
    ),
    "silu_split": (
        lambda projected, **options: kernels.silu_split(projected, 2, 1, 2, 3, **options), {},
        lambda rows: [torch.randn(2 * rows, 14)],
    ),
    "sampled_softmax_loss own": (kernels.sampled_softmax_loss, {}, loss(lambda tokens: tokens)),
    "sampled_softmax_loss groups": (
        kernels.sampled_softmax_loss, {"group_size": 8}, loss(lambda tokens: -(-tokens // 8))
    ),
    "sampled_softmax_loss all": (kernels.sampled_softmax_loss, {"group_size": 0}, loss(lambda tokens: 1)),
}  # fmt: skip


def with_gradients(call: Callable[..., Sequence[Tensor]], arguments: list[Any]) -> list[Tensor]:
    """The results of ``call`` and the gradients of its floating arguments, with a fixed seed."""
    torch.manual_seed(2)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    results = list(call(*leaves))
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return [*results, *torch.autograd.grad(results, inputs, [torch.full_like(x, 0.5) for x in results])]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_and_exports(name: str, backend: str) -> None:
    function, options, make = CALLS[name]
    call = Call(function, {**options, "backend": backend})
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (10, 23):
        arguments = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in make(tokens)]
        expected = with_gradients(call, arguments)
        torch.testing.assert_close(with_gradients(compiled, arguments), expected)

    exported = torch.export.export(call, tuple(arguments))
    torch.manual_seed(2)
    results = exported.module()(*arguments)
    torch.testing.assert_close(list(results), expected[: len(results)])


def test_every_public_function_is_among_them() -> None:
    assert {name.split()[0] for name in CALLS} == set(kernels.__all__) - {"plan_attention"}


@pytest.mark.parametrize("name", CALLS)
def test_launches_on_the_device_of_its_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, so forward and backward make the device of their first tensor current."""
    entered: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    function, options, make = CALLS[name]
    with_gradients(
        Call(function, {**options, "backend": "triton"}),
        [x.to(DEVICE) if isinstance(x, Tensor) else x for x in make(6)],
    )
    assert len(entered) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_a_device_that_is_not_the_current_one(name: str) -> None:
    function, options, make = CALLS[name]
    arguments = [x.to("cuda:1") if isinstance(x, Tensor) else x for x in make(6)]
    results = with_gradients(Call(function, {**options, "backend": "triton"}), arguments)
    assert all(x.device.index == 1 and x.isfinite().all() for x in results)
