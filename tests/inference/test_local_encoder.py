"""A history alone is encoded as in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mme.config import load_config
from mme.errors import NonFiniteError
from mme.evaluation.request_batch import sequence_batch
from mme.inference.program import sample_requests
from tests.inference.test_padded import BLOCKS, untrained

SMALL = [
    "data.path=nowhere",
    "data.max_seq_len=24",
    "model.embedding_dim=16",
    "model.num_tables=2",
    "model.num_heads=2",
]


@pytest.mark.parametrize("overrides", BLOCKS, ids=lambda overrides: overrides[0])
def test_states_do_not_depend_on_the_batch(overrides: list[str]) -> None:
    model = untrained(load_config(None, [*SMALL, "kernels.backend=torch", *overrides]))
    requests = sample_requests(model, np.array([1, 2, 24, 7]))
    together = model.encode(requests)
    for row in range(4):
        (alone,) = model._encoder.encode(sequence_batch(requests, np.array([row]), model.config)[0])
        torch.testing.assert_close(alone, together[row], rtol=0, atol=2e-6)


def test_a_state_alone_that_is_not_finite_is_named() -> None:
    model = untrained(load_config(None, SMALL))
    with torch.no_grad():
        model._encoder.decoder.inputs.positions.fill_(1e30)  # finite, but its square is not
    with pytest.raises(NonFiniteError, match="not finite for 1 of 1 histories"):
        model.encode(sample_requests(model, np.array([3])))
