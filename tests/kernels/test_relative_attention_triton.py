"""The Triton form of relative attention, on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import plan_attention, relative_attention
from kernels.relative_attention.reference import relative_attention_reference, time_bucket
from kernels.relative_attention.time_tables import code_thresholds, time_cells, time_thresholds
from kernels.relative_attention.triton_form import LaunchConfig, attention_op
from kernels.relative_attention.work_plan import make_work_lists
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
    """The error is within twice that of the definition computed in the same dtype plus one rounding of the output."""
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


def jump(gap: int) -> torch.Tensor:
    """Equal times of two blocks of 32 keys with ``gap`` seconds between them, and the times after them."""
    return torch.tensor([0] * 32 + [gap] * 33)


# Times of sequences, with the kinds of tiles below the diagonal that they have in blocks of 32.
TILES = {
    "one bucket": ([jump(0), jump(1_000_000)], {"one"}),
    "two buckets": ([torch.tensor([0] * 32 + [1_000_000] * 17 + [1_200_000] * 16)], {"two"}),
    "many buckets": ([torch.exp(0.15 * torch.arange(70.0)).long().cumsum(0)], {"several"}),
    "steps back": ([jump(-700_000), torch.arange(65).flip(0)], {"one", "several"}),
    "span of 2**31 - 1": ([jump(2**31 - 1)], {"one"}),
    "span of 2**31": ([jump(2**31)], {"several"}),
    "wide beside narrow": ([jump(-(2**40)), jump(300_000)], {"one", "several"}),
}


def tile_kinds(codes: torch.Tensor, query_items: torch.Tensor) -> set[str]:
    below = [codes[row, :block].tolist() for _, block, row, _ in query_items.tolist() if block > 0]
    return {"several" if code < 0 else "two" if code < 129 else "one" for row in below for code in row}


@pytest.mark.parametrize("times, kinds", TILES.values(), ids=TILES)
def test_tiles_by_their_number_of_time_buckets(times: list[torch.Tensor], kinds: set[str]) -> None:
    case = make_case([len(x) - 1 for x in times], dqk=4, dv=4, timestamps=torch.cat(times) + 1_500_000_000)
    plan = plan_attention(case.seq_offsets, case.max_seq_len, case.timestamps, backend="triton")
    lists = plan.lists(32)
    assert tile_kinds(lists.codes, lists.query_items) == kinds
    spans = [int(x.max() - x.min()) for x in times]
    assert plan.any_wide == (max(spans) >= 2**31)
    assert_agrees(attention, on_device(case), torch.float32, 2e-6)


def test_codes_name_the_buckets_of_each_tile() -> None:
    """Each code matches the buckets of all pairs of its tile, in times with jumps, repeats and steps back."""
    random = torch.Generator().manual_seed(0)
    lengths = [100, 0, 37, 64]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    times = (torch.exp(14 * torch.rand(sum(lengths) + 4, generator=random)).long() - 5000).cumsum(0)
    lists = make_work_lists(offsets, times, 100, 16)
    for sequence, block, row, wide in lists.query_items.tolist():
        if sequence < 0:
            continue
        start, length = int(offsets[sequence]), lengths[sequence]
        own = times[start + sequence : start + sequence + length + 1]
        assert not wide and torch.equal(lists.seconds[start + sequence :][: length + 1].long(), own - own.min())
        several = []
        for key_block in range(block):
            queries, keys = own[1:][16 * block : 16 * block + 16], own[16 * key_block : 16 * key_block + 16]
            seconds = queries[:, None] - keys[None, :]
            found, code = set(time_bucket(seconds).flatten().tolist()), int(lists.codes[row, key_block])
            if code >= 129:
                assert found == {code - 129}
            elif code >= 0:
                assert found <= {code - 1, code} and seconds.min() >= 0
            else:
                assert (-1 - code) // 129 <= min(found) and max(found) <= (-1 - code) % 129
            several += [key_block] if code < 129 else []
        count = int(lists.tile_counts[row])
        assert lists.tiles[row, :count].tolist() == several


def test_cells_put_every_difference_where_the_formula_does() -> None:
    """Checks every threshold ± 300 s and a million differences of both signs."""
    boundary = torch.exp(0.301 * torch.arange(146, dtype=torch.float64)).clamp(max=2.0**62).long()
    random = torch.exp(43 * torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    seconds = torch.cat([*(boundary + step for step in range(-300, 301)), random.long()])
    seconds = torch.cat([seconds, -seconds])
    x = seconds.float()
    cell = time_cells(torch.device("cpu"))[(x.view(torch.int32).long() & 0xFFFFFFFF) >> 21]
    threshold = cell.to(torch.int32).view(torch.float32)
    assert torch.equal((cell >> 32) + (x.abs() >= threshold), time_bucket(seconds))


def test_offsets_that_are_not_contiguous() -> None:
    case = on_device(make_case([5, 0, 19]))
    strided = torch.stack([case.seq_offsets, torch.full_like(case.seq_offsets, -1)], dim=1)[:, 0]
    assert_agrees(attention, replace(case, seq_offsets=strided), torch.float32, 2e-6)


@pytest.mark.parametrize("width", [8, 16, 24, 50, 64, 96, 128, 192, 256])
def test_widths(width: int) -> None:
    """Covers each kind of tiles of `LaunchConfig` in bfloat16, and keys and values of different widths."""
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


def test_whole_seconds_reach_a_bucket_where_float32_does() -> None:
    thresholds = code_thresholds(torch.device("cpu"))
    reached = thresholds[:129][thresholds[:129] < 2**31 - 1].long()
    assert torch.equal(time_bucket(reached)[2:], torch.arange(2, len(reached)))
    assert (time_bucket(reached - 1)[2:] < torch.arange(2, len(reached))).all()
    assert len(reached) == 72 and (thresholds[129:] == 0).all()


def test_work_lists_hold_every_block_once_heaviest_first() -> None:
    lists = make_work_lists(torch.tensor([0, 70, 70, 80, 280]), torch.arange(284), 200, 64)
    real = [tuple(item) for item in lists.query_items.tolist() if item[0] >= 0]
    assert real == [(3, 3, 6, 0), (3, 2, 5, 0), (0, 1, 1, 0), (3, 1, 4, 0), (0, 0, 0, 0), (2, 0, 2, 0), (3, 0, 3, 0)]
    keys = [tuple(item[:2]) for item in lists.key_items.tolist() if item[0] >= 0]
    assert keys == [(3, 0), (3, 1), (0, 0), (3, 2), (0, 1), (2, 0), (3, 3)]
    assert lists.counts.tolist() == [7, 4, 2, 1]
    assert lists.query_items.shape == (280 // 64 + 4, 4)


def test_one_plan_and_repeats_bit_for_bit() -> None:
    case = on_device(make_case([65, 3], groups=2, longest_step=1.0)).to(torch.float32)
    plan = plan_attention(case.seq_offsets, case.max_seq_len, case.timestamps, backend="triton")
    first, second = results(attention, case), results(functools.partial(attention, plan=plan), case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="plan is a WorkPlan, which is for a backend other than torch"):
        results(functools.partial(relative_attention, backend="torch", plan=plan), case)


def test_custom_operator_passes_opcheck() -> None:
    case = on_device(make_case([3, 0, 2], dqk=3, dv=4)).to(torch.float32)
    block = LaunchConfig.choose_block(3, 4, 4, "ieee")
    lists = make_work_lists(case.seq_offsets, case.timestamps, case.max_seq_len, block).tensors()
    floats = [x.requires_grad_() for x in (case.q, case.k, case.v, case.ts_weights, case.pos_weights)]
    others = (case.seq_offsets, case.timestamps, lists, case.max_seq_len, True, "ieee")
    torch.library.opcheck(attention_op, (*floats, *others))


def test_float64_is_refused() -> None:
    case = on_device(make_case([3]))
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64; the triton backend takes float32"):
        results(attention, case)
