"""One block agrees with the public FuXi-α code in its output and every gradient.

`golden/*.npz` contain one float32 forward and backward pass of the public implementation (arXiv 2502.03036): `x`, `seq_offsets`,
padded `timestamps`, every weight (`param.*`), `y`, `grad_y` and every gradient (`grad_x`, `grad.*`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mme.interop.fuxi_alpha import block_from_public

GOLDEN = [Path(__file__).parent / "golden" / f"fuxi_block_h{heads}.npz" for heads in (1, 2)]
RELATIVE_ERROR = 1e-5


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    wanted = torch.from_numpy(expected)
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_block_agrees_with_the_public_code(path: Path) -> None:
    golden = np.load(path)
    offsets = torch.from_numpy(golden["seq_offsets"])
    # Padded (B, N): the time of the next event follows each history's times.
    timestamps = torch.cat(
        [torch.from_numpy(row[: length + 1]) for row, length in zip(golden["timestamps"], offsets.diff(), strict=True)]
    )
    params = {name.removeprefix("param."): golden[name] for name in golden if name.startswith("param.")}
    sizes = {name: int(golden[name]) for name in ("max_seq_len", "num_heads", "dqk", "dv")}
    block = block_from_public(params, **sizes)
    x = torch.from_numpy(golden["x"]).requires_grad_()
    y = block(x, offsets, timestamps)
    y.backward(torch.from_numpy(golden["grad_y"]))

    assert relative_error(y.detach(), golden["y"]) < RELATIVE_ERROR
    assert relative_error(x.grad, golden["grad_x"]) < RELATIVE_ERROR
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    assert set(gradients) == set(params)
    for name, gradient in gradients.items():
        assert relative_error(gradient, golden[f"grad.{name}"]) < RELATIVE_ERROR, name


def test_gradients_reach_tensors_that_ask_for_them() -> None:
    golden = np.load(GOLDEN[0])
    params = {
        name.removeprefix("param."): torch.from_numpy(golden[name]).requires_grad_()
        for name in golden
        if name.startswith("param.")
    }
    block = block_from_public(params, max_seq_len=int(golden["max_seq_len"]), num_heads=1, dqk=16, dv=16)
    x = torch.from_numpy(golden["x"])
    block(x[:3], torch.tensor([0, 3]), torch.tensor([5, 60, 7000, 90000])).sum().backward()
    for name, value in params.items():
        assert value.grad is not None and value.grad.abs().sum() > 0, name
