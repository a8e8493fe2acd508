"""The kernels' benchmarks at tiny sizes: every form is checked, then measured, and the results can be read back."""

from __future__ import annotations

import functools
import json
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention, elementwise, expert_ffn, step_memory
from benchmarks.roofline import backends, peak_memory

CPU = torch.device("cpu")
OURS = backends(torch.device("cuda") if torch.cuda.is_available() else CPU)  # the interpreter's too, under these tests


def run(main: Callable[..., None], path: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows that a benchmark writes, each with a time and, for arithmetic, a share of the bound."""
    main(**options, json_path=path)
    written = json.loads(path.read_text())
    assert written["device"] and written["torch"] == torch.__version__
    assert all(row["ms"] > 0 for row in written["rows"])
    rows: list[dict[str, Any]] = written["rows"]
    return rows


@pytest.mark.parametrize("skewed", [False, True])
def test_attention(skewed: bool, tmp_path: Path) -> None:
    options = {"lengths": "20", "widths": "2x8", "tokens": 30, "skewed": skewed, "compiled": False, "seconds": 0.0}
    rows = run(attention.main, tmp_path / "out.json", **options)
    assert [row["form"] for row in rows[len(OURS) :: 2]] == [*OURS, "padded"]
    measured = [row for row in rows if row["gflop"]]
    assert all(row["roofline_share"] > 0 for row in measured)
    assert all("step_mem_gib" in row for row in measured if row["pass"] == "backward")
    forward, backward = measured[:2]
    assert backward["gflop"] == pytest.approx(2 * forward["gflop"])
    lengths = attention.Shape(20, 2, 8, 30, skewed).lengths(torch.Generator().manual_seed(20))
    if skewed:
        assert lengths.tolist() == [20] + [2] * 5
    pairs = sum(length * (length + 1) // 2 for length in lengths.tolist())
    assert forward["gflop"] == pytest.approx(2e-9 * pairs * 2 * 4 * 8)


def semantic_channel(q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, longest: int, alpha: float) -> Tensor:
    """The computation of the public kernels, on (T, heads, width)."""
    token = torch.arange(len(q))
    sequence = torch.searchsorted(seq_offsets, token, right=True)
    mask = (sequence[:, None] == sequence[None, :]) & (token[:, None] >= token[None, :])
    scores = torch.nn.functional.silu(alpha * torch.einsum("ihd,jhd->hij", q, k)) / longest * mask
    return torch.einsum("hij,jhd->ihd", scores, v)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("alpha", [1.0, 0.5], ids=["the same", "another arithmetic"])
def test_public_kernels_are_measured_if_they_compute_the_same(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package runs without a GPU, so functions with the same signatures replace them."""

    def hstu_mha(
        max_seq_len: int, scale: float, q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, kernel: str
    ) -> Tensor:
        assert kernel == "triton"
        return semantic_channel(q, k, v, seq_offsets, max_seq_len, scale * alpha)

    def hstu_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, longest_q: int, longest_k: int,
        *, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert offsets_q.dtype == offsets_k.dtype == torch.int32 and window_size == (-1, 0)
        return semantic_channel(q, k, v, offsets_k.long(), longest_q, alpha)

    stand_in(monkeypatch, "generative_recommenders")
    stand_in(monkeypatch, "generative_recommenders.common", HammerKernel=types.SimpleNamespace(TRITON="triton"))
    stand_in(monkeypatch, "generative_recommenders.ops")
    stand_in(monkeypatch, "generative_recommenders.ops.hstu_attention", hstu_mha=hstu_mha)
    stand_in(monkeypatch, "hstu_attn", hstu_attn_varlen_func=hstu_attn_varlen_func)
    shape = attention.Shape(12, 2, 8, 30, skewed=False)
    measure = functools.partial(attention.measure, shape, torch.float32, CPU, 0.0, compiled=False)
    if alpha != 1:
        with pytest.raises(RuntimeError, match="the generative-recommenders form differs"):
            measure()
        return
    rows = measure()
    assert [row["form"] for row in rows[-4:]] == ["generative-recommenders"] * 2 + ["hstu_attn"] * 2
    ours = next(row for row in rows if row["pass"] == "forward")
    assert rows[-2]["gflop"] == pytest.approx(ours["gflop"] / 2)


def test_a_wrong_gradient_is_refused() -> None:
    x = torch.randn(5, requires_grad=True)
    attention.check_agreement("same", lambda: 2 * x, lambda: x + x, [x], 1e-6)
    with pytest.raises(RuntimeError, match="the wrong form differs from its reference by 5"):
        attention.check_agreement("wrong", lambda: 2 * x - 0.5 * (x - x.detach()) * 2, lambda: 2 * x, [x], 1e-6)


@pytest.mark.parametrize("skewed", [False, True])
def test_expert_ffn(skewed: bool, tmp_path: Path) -> None:
    options = {"rows": 32, "widths": "8x16", "experts": "3", "skewed": skewed, "seconds": 0.0}
    rows = run(expert_ffn.main, tmp_path / "out.json", **options)
    assert [row["form"] for row in rows[::2]] == ["eager", "grouped", *OURS, "copies", "routed"]
    assert all(row["roofline_share"] > 0 for row in rows)


def test_elementwise(tmp_path: Path) -> None:
    rows = run(elementwise.main, tmp_path / "out.json", rows="16", widths="8", seconds=0.0)
    assert {row["operation"] for row in rows} == {"norm", "gated", "gated, dropout", "silu_split"}
    assert {row["form"] for row in rows} == {"eager", *OURS}
    assert all(row["memory_share"] > 0 for row in rows)


def test_step_memory_of_a_long_history_is_a_small_share_of_the_padded_forms(tmp_path: Path) -> None:
    step_memory.main(lengths="1024", sequences=1, width=16, blocks=1, json_path=tmp_path / "out.json")
    kernels, padded = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (kernels["form"], padded["form"]) == ("kernels", "padded")
    assert padded["step_mem_gib"] > 3 * 1024**2 * 4 / 2**30  # three matrices of (N, N) at least
    assert kernels["share"] == kernels["step_mem_gib"] / padded["step_mem_gib"]


def test_peak_memory_includes_freed_memory() -> None:
    assert peak_memory(lambda: torch.ones(64 << 18).sum(), CPU) == pytest.approx(1 / 16, rel=0.2)
    assert peak_memory(lambda: None, CPU) < 0.01
