"""The Triton form of relative attention, on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import plan_attention, relative_attention
from kernels.relative_attention.reference import relative_attention_reference, time_bucket
from kernels.relative_attention.triton_form import LaunchConfig, attention_op, make_work_lists, time_thresholds
from tests.kernels.attention_cases import (
    Case,
    assert_agrees,
    make_case,
    relative_errors,
    results,
    times_of_every_bucket,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
attention = functools.partial(relative_attention, backend="triton")

EDGES = {
    "empty sequences": ([0, 3, 0, 5, 0], 1, 8, 8),
    "no token": ([0, 0], 2, 4, 4),
    "block and block ± 1": ([31, 32, 33, 63, 64, 65], 1, 33, 40),
    "one giant among dwarfs": ([2, 135, 1], 1, 40, 40),
    "groups that share a program": ([20, 7], 3, 16, 9),
    "wide values": ([34], 1, 8, 200),
    "wide keys": ([34], 1, 136, 8),
}


def on_device(case: Case) -> Case:
    return Case(**{name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in vars(case).items()})


@pytest.mark.parametrize("lengths, groups, dqk, dv", EDGES.values(), ids=EDGES)
def test_edges(products: float, lengths: list[int], groups: int, dqk: int, dv: int) -> None:
    case = make_case(lengths, groups=groups, dqk=dqk, dv=dv, max_seq_len=max(*lengths, 1) + 3, longest_step=3.0)
    assert_agrees(attention, on_device(case), torch.float32, max(2e-6, products))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(0, 66), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    dqk=st.integers(1, 40),
    dv=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_random_shapes(lengths: list[int], groups: int, dqk: int, dv: int, seed: int) -> None:
    case = make_case(lengths, groups=groups, dqk=dqk, dv=dv, longest_step=3.0, seed=seed)
    assert_agrees(attention, on_device(case), torch.float32, 2e-6)


LOW_PRECISION = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="f16")]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(dtype: torch.dtype) -> None:
    """Within twice the error of the definition computed in the same dtype, and one rounding of the output."""
    case = on_device(make_case([40, 9], groups=2, dqk=16, dv=16)).to(dtype)
    exact = results(relative_attention_reference, case.to(torch.float64))
    eager = relative_errors(results(relative_attention_reference, case), exact)
    found = relative_errors(results(attention, case), exact)
    assert all(error <= 2 * (limit + torch.finfo(dtype).eps) for error, limit in zip(found, eager, strict=True)), found


def test_every_time_bucket() -> None:
    times = times_of_every_bucket()
    assert set(time_bucket(times[1:] - times[0]).tolist()) == set(range(129)) - {1}
    case = make_case([len(times) - 1], dqk=4, dv=4, timestamps=times)
    assert_agrees(attention, on_device(case), torch.float32, 2e-6)


def test_equal_times_and_times_that_step_back() -> None:
    rising = times_of_every_bucket()[::4]
    for times in (torch.full_like(rising, 7), rising.flip(0), rising[torch.randperm(len(rising))]):
        case = make_case([len(times) - 1], dqk=4, dv=4, timestamps=times)
        assert_agrees(attention, on_device(case), torch.float32, 2e-6)


def test_offsets_that_are_not_contiguous() -> None:
    case = on_device(make_case([5, 0, 19]))
    strided = torch.stack([case.seq_offsets, torch.full_like(case.seq_offsets, -1)], dim=1)[:, 0]
    assert_agrees(attention, replace(case, seq_offsets=strided), torch.float32, 2e-6)


@pytest.mark.parametrize("width", [8, 16, 24, 50, 64, 96, 128, 192, 256])
def test_widths(width: int) -> None:
    """Each kind of tiles of `LaunchConfig`, in bfloat16, and keys and values of different width."""
    case = make_case([19, 3], groups=2, dqk=width, dv=264 - width).to(torch.bfloat16).to(torch.float64)
    exact = results(relative_attention_reference, case)
    eager = relative_errors(results(relative_attention_reference, case.to(torch.bfloat16)), exact)
    found = relative_errors(results(attention, on_device(case.to(torch.bfloat16))), [x.to(DEVICE) for x in exact])
    assert all(error <= 2 * (limit + 2**-8) for error, limit in zip(found, eager, strict=True)), found


def test_thresholds_put_every_difference_where_the_formula_does() -> None:
    thresholds = time_thresholds(torch.device("cpu"))
    exact = torch.exp(0.301 * torch.arange(146, dtype=torch.float64)).clamp(max=2.0**62).long()
    near = torch.cat([exact + step for step in range(-300, 301, 7)]).clamp(min=0)
    found = torch.bucketize(near.float().clamp(min=1), thresholds[1:], right=True)
    assert torch.equal(found, time_bucket(near))


def test_work_lists_hold_every_block_once_heaviest_first() -> None:
    lists = make_work_lists(torch.tensor([0, 70, 70, 80, 280]), 280, 200, 64)
    real = [tuple(item) for item in lists.query_items.tolist() if item[0] >= 0]
    assert real == [(3, 3), (3, 2), (0, 1), (3, 1), (0, 0), (2, 0), (3, 0)]
    keys = [tuple(item) for item in lists.key_items.tolist() if item[0] >= 0]
    assert keys == [(3, 0), (3, 1), (0, 0), (3, 2), (0, 1), (2, 0), (3, 3)]
    assert lists.counts.tolist() == [7, 4, 2, 1]
    assert lists.query_items.shape == (280 // 64 + 4, 2)


def test_one_plan_and_repeats_bit_for_bit() -> None:
    case = on_device(make_case([65, 3], groups=2, longest_step=1.0)).to(torch.float32)
    plan = plan_attention(case.seq_offsets, case.max_seq_len, case.timestamps, backend="triton")
    first, second = results(attention, case), results(functools.partial(attention, plan=plan), case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="plan is a WorkPlan, made for another backend than torch"):
        results(functools.partial(relative_attention, backend="torch", plan=plan), case)


def test_custom_operator_passes_opcheck() -> None:
    case = on_device(make_case([3, 0, 2], dqk=3, dv=4)).to(torch.float32)
    block = LaunchConfig.choose(1, 3, 4, 4, "ieee").block
    lists = make_work_lists(case.seq_offsets, 5, case.max_seq_len, block)
    floats = [x.requires_grad_() for x in (case.q, case.k, case.v, case.ts_weights, case.pos_weights)]
    work = (lists.query_items, lists.key_items, lists.counts)
    torch.library.opcheck(attention_op, (*floats, case.seq_offsets, case.timestamps, *work, case.max_seq_len, "ieee"))


def test_float64_is_refused() -> None:
    case = on_device(make_case([3]))
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64; the triton backend takes float32"):
        results(attention, case)
