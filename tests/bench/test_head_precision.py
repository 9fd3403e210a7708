"""What the narrow forms of the head round, and how a shortlist's agreement is counted."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.bench.head_precision import FORMS, Narrow, bf16, int8, stay


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40))
def test_factors_err_by_no_more_than_their_steps(values: list[float]) -> None:
    x = torch.tensor([values])
    assert bool(((bf16(x) - x).abs() <= x.abs() / 256 + 1e-30).all())
    assert bool(((int8(x) - x).abs() <= x.abs().max() / 253 + 1e-6).all())


def test_a_narrow_layer_is_the_layer_for_factors_that_need_no_rounding() -> None:
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (4, 8)).float()).clamp_(-127, 127)[:, 0] = 127
    x = torch.randint(0, 128, (5, 8)).float()
    x[:, 0] = 127
    for form in FORMS:
        assert torch.equal(Narrow(layer, form)(x), layer(x))


def test_what_stays_of_the_best() -> None:
    exact = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert stay(exact, exact * 2, 2).tolist() == [1.0, 1.0]
    assert stay(exact, np.array([[4.0, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]]), 2).tolist() == [0.5, 0.0]
