"""The measured shortcuts agree with the definition, also for buckets without a whole second."""

from __future__ import annotations

import torch

from benchmarks import attention_shortcuts
from kernels.relative_attention.reference import relative_attention_reference, time_bucket
from tests.kernels.attention_cases import make_case, times_of_every_bucket


def test_both_channels_by_either_form() -> None:
    times = times_of_every_bucket()
    length = len(times) - 1
    case = make_case([length], dqk=1, dv=3, timestamps=times)
    expected = relative_attention_reference(
        case.q, case.k, case.v, case.seq_offsets, length, times, case.ts_weights, case.pos_weights
    )[0]
    v, recent = case.v[0], case.pos_weights[:length].flip(0)
    buckets = list(attention_shortcuts.bucket_tiles(times))
    temporal = (
        attention_shortcuts.temporal_tiles(v, case.ts_weights, buckets=buckets),
        attention_shortcuts.temporal_segments(v, case.ts_weights, times=times),
    )
    positional = attention_shortcuts.positional_tiles(v, recent), attention_shortcuts.positional_convolution(v, recent)
    for channel, forms in enumerate((positional, temporal)):
        for found in forms:
            torch.testing.assert_close(found, expected[:, 3 * channel : 3 * channel + 3])


def test_buckets_start_where_the_formula_puts_them() -> None:
    starts = attention_shortcuts.bucket_starts(torch.device("cpu"))
    bucket = torch.arange(len(starts))
    assert (time_bucket(starts) >= bucket).all()
    assert (time_bucket((starts - 1).clamp(min=0))[1:] < bucket[1:]).all()


def test_measures_every_form() -> None:
    rows = attention_shortcuts.measure(70, 4, torch.device("cpu"), seconds=0.0)
    assert [row["form"] for row in rows] == ["tiles", "tiles, their buckets too", "segments", "tiles", "convolution"]
    assert all(row["ms"] > 0 and row["times_faster"] > 0 for row in rows)
