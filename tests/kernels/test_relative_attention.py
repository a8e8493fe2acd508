"""The PyTorch form of relative attention, and the checks of arguments for both forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import plan_attention, relative_attention
from kernels.relative_attention import plan as plan_module
from kernels.relative_attention.plan import MASKED_BUCKET, make_tile_plan
from kernels.relative_attention.reference import time_bucket
from kernels.relative_attention.torch_op import tiled_op
from tests.kernels.attention_cases import Case, assert_agrees, make_case, relative_errors, results

EDGES = {
    "empty sequences": [0, 3, 0, 0, 5, 0],
    "no token": [0, 0],
    "single tokens": [1, 1, 1],
    "chunk and chunk ± 1": [63, 64, 65],
    "padding and padding ± 1": [15, 16, 17, 95, 96, 97],
    "one giant among dwarfs": [2, 300, 1, 3],
    "all equal": [40] * 5,
}


@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["f64", "f32"])
def test_edges(lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    assert_agrees(relative_attention, make_case(lengths, groups=3, dqk=5, dv=7), dtype, tolerance)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=8),
    groups=st.integers(1, 5),
    dqk=st.integers(1, 20),
    dv=st.integers(1, 20),
    spare=st.integers(0, 50),
    seed=st.integers(0, 1000),
)
def test_random_shapes(lengths: list[int], groups: int, dqk: int, dv: int, spare: int, seed: int) -> None:
    max_seq_len = max([1, *lengths]) + spare
    case = make_case(lengths, groups=groups, dqk=dqk, dv=dv, max_seq_len=max_seq_len, seed=seed)
    assert_agrees(relative_attention, case, torch.float64, 1e-12)


def test_low_precision_computes_in_float32() -> None:
    case = make_case([30, 70], groups=2)
    for dtype, tolerance in ((torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
        assert_agrees(relative_attention, case, dtype, tolerance)


def test_strided_operands() -> None:
    case = make_case([20, 5], groups=2, dqk=6, dv=6).to(torch.float64)
    both = torch.cat([case.q, case.k], 2)
    strided = Case(**{**vars(case), "q": both[:, :, :6], "k": both[:, :, 6:]})
    assert_agrees(relative_attention, strided, torch.float64, 1e-13)


def test_gradients_are_the_derivative() -> None:
    case = make_case([3, 0, 6], groups=2, dqk=3, dv=2)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.ts_weights, case.pos_weights)]

    def attention(*x: torch.Tensor) -> torch.Tensor:
        return relative_attention(*x[:3], case.seq_offsets, 6, case.timestamps, *x[3:])

    assert torch.autograd.gradcheck(attention, leaves)


def test_one_plan_serves_many_calls_and_group_counts() -> None:
    for groups in (1, 4):
        case = make_case([50, 0, 80], groups=groups)
        plan = plan_attention(case.seq_offsets, case.max_seq_len, case.timestamps)
        for _ in range(2):
            found = results(lambda *x, plan=plan: relative_attention(*x, plan=plan), case)
            assert max(relative_errors(found, results(relative_attention, case))) == 0


def test_repeats_bit_for_bit() -> None:
    case = make_case([90, 12, 33, 200], groups=2, dqk=16, dv=16).to(torch.float32)
    first, second = results(relative_attention, case), results(relative_attention, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_buckets_computed_again_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "MAX_KEPT_PAIRS", 0)
    case = make_case([20, 150, 64], groups=2)
    assert make_tile_plan(case.seq_offsets, case.timestamps).buckets.numel() == 0
    assert_agrees(relative_attention, case, torch.float64, 1e-13)


def test_every_time_bucket_equal_and_backward_times() -> None:
    spread = torch.exp(torch.arange(0.0, 43, 0.6, dtype=torch.float64)).long()
    for times in (spread, torch.full_like(spread, 7), spread.flip(0), spread[torch.randperm(len(spread))]):
        case = make_case([len(times) - 1], timestamps=times)
        assert_agrees(relative_attention, case, torch.float64, 1e-13)


def test_buckets_are_the_public_formula_at_every_boundary() -> None:
    boundary = torch.exp(0.301 * torch.arange(1.0, 146, dtype=torch.float64)).clamp(max=2.0**62).long()
    near = torch.cat([boundary + step for step in (-300, -2, -1, 0, 1, 2, 300)])
    times = torch.stack([torch.zeros_like(near), near], 1)
    plan = make_tile_plan(torch.arange(len(near) + 1), times.view(-1))
    # Each sequence has one token, in slots 16 apart, so its own bucket comes first in each 16 × 16 tile.
    assert torch.equal(plan.buckets.view(-1, 256)[:, 0].long(), time_bucket(near))
    assert time_bucket(near).max() == 128 and (plan.buckets.view(-1, 16, 16)[:, 0, 1:] == MASKED_BUCKET).all()


def test_operator_passes_opcheck_and_compiles_whole() -> None:
    case = make_case([5, 0, 9], groups=2, dqk=3, dv=4).to(torch.float32)
    floats = [x.requires_grad_() for x in (case.q, case.k, case.v, case.ts_weights, case.pos_weights)]
    torch.library.opcheck(tiled_op, (*floats, case.seq_offsets, case.timestamps, case.max_seq_len))
    compiled = torch.compile(relative_attention, fullgraph=True, backend="aot_eager")
    assert_agrees(compiled, case, torch.float32, 2e-6)


def arguments() -> dict[str, object]:
    case = make_case([4, 6], groups=2, dqk=3, dv=5, max_seq_len=8)
    return {name: x for name, x in vars(case).items() if name != "grad"}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: x[0], r"q must be floating and \(G, T, dqk\)"),
        ("k", lambda x: x[:, :, :2], r"k has shape \(2, 10, 2\); q has \(2, 10, 3\)"),
        ("v", lambda x: x[:, :9], r"v has shape \(2, 9, 5\)"),
        ("v", lambda x: x.half(), r"v has dtype torch\.float16; q has torch\.float"),
        ("seq_offsets", lambda x: x.int(), r"seq_offsets must be int64"),
        ("seq_offsets", lambda x: torch.tensor([0, 11, 10]), r"seq_offsets must not decrease"),
        ("seq_offsets", lambda x: torch.tensor([1, 4, 10]), r"seq_offsets must start at 0, not 1"),
        ("max_seq_len", lambda x: 5, r"pos_weights has shape \(15,\); expected \(9,\)"),
        ("timestamps", lambda x: x[:-1], r"timestamps has 11 entries; T \+ B is 12"),
        ("timestamps", lambda x: x.double(), r"timestamps must be int64"),
        ("ts_weights", lambda x: x[:-1], r"ts_weights has shape \(128,\); expected \(129,\)"),
        ("pos_weights", lambda x: x[:-1], r"pos_weights has shape \(14,\); expected \(15,\)"),
        ("pos_weights", lambda x: x.long(), r"pos_weights has dtype torch\.int64, expected a floating one"),
        ("q", lambda x: x.long(), r"q must be floating|q has dtype torch\.int64"),
        ("k", lambda x: x.to("meta"), "k is on meta; q is on cpu"),
        ("timestamps", lambda x: x.to("meta"), "seq_offsets is on cpu; timestamps is on meta"),
        ("ts_weights", lambda x: x.to("meta"), "ts_weights is on meta; q is on cpu"),
        ("seq_offsets", lambda x: x[:0], r"seq_offsets is empty"),
        ("seq_offsets", lambda x: x[None], r"seq_offsets must be int64 of one dimension"),
        ("max_seq_len", lambda x: 0, r"max_seq_len \(0\) must be at least 1"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_arguments_are_named(backend: str, name: str, change: object, message: str) -> None:
    bad = arguments()
    if backend == "triton":
        bad = {key: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in bad.items()}
    bad[name] = change(bad[name])
    with pytest.raises(ValueError, match=message):
        relative_attention(**bad, backend=backend)


def test_a_plan_of_another_batch_is_refused() -> None:
    good, other = arguments(), make_case([3], max_seq_len=8)
    plan = plan_attention(other.seq_offsets, 8, other.timestamps)
    with pytest.raises(ValueError, match="plan is of a batch of 3 tokens; q has 10"):
        relative_attention(**good, plan=plan)


def test_sequence_longer_than_max_seq_len() -> None:
    bad = arguments() | {"max_seq_len": 5, "pos_weights": torch.zeros(9, dtype=torch.float64)}
    with pytest.raises(ValueError, match="seq_offsets has a sequence of 6 tokens; max_seq_len is 5"):
        relative_attention(**bad)


def test_backends_are_never_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        relative_attention(**arguments(), backend="triton")
    with pytest.raises(ValueError, match=r"backend \('cuda'\) must be one of auto, torch, triton"):
        relative_attention(**arguments(), backend="cuda")


def test_the_longest_sequence() -> None:
    """Compares some rows of a sequence of 16,384 tokens and of a short one with the definition, row by row in float64."""
    longest, width = 16_384, 4
    random = torch.Generator().manual_seed(0)
    lengths = [longest, 3]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(1, sum(lengths), width, generator=random) for _ in range(3))
    steps = torch.exp(13 * torch.rand(sum(lengths) + 2, generator=random)).long()
    times = 1_500_000_000 + steps.cumsum(0)
    ts_weights, pos_weights = (torch.randn(size, generator=random) for size in (129, 2 * longest - 1))
    out = relative_attention(q, k, v, offsets, longest, times, ts_weights, pos_weights)
    for row in (0, 1, 63, 64, 8191, 16_000, 16_383, 16_384, 16_386):
        start, extra = (0, 0) if row < longest else (longest, 1)
        keys = torch.arange(start, row + 1)
        seconds = times[row + 1 + extra] - times[keys + extra]
        weights = (
            pos_weights[keys - row + longest - 1],
            ts_weights[time_bucket(seconds)],
            torch.nn.functional.silu(q[0, row].double() @ k[0, keys].double().T) / longest,
        )
        expected = torch.cat([weight.double() @ v[0, keys].double() for weight in weights])
        error = (out[0, row].double() - expected).norm() / expected.norm()
        assert error < 1e-5, (row, error)
