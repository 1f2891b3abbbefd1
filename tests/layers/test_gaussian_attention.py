"""Gaussian attention as a layer: its parameters, and what it refuses; more in tests/models/test_mixers.py."""

from __future__ import annotations

import math

import pytest

from kmixer.errors import InputError
from kmixer.layers import GaussianAttention

WIDTH, HEADS = 12, 3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("value_source", ["kernel", "pre_rope"])
def test_its_parameters_are_one_matrix_and_a_bandwidth_a_head(bias: bool, value_source: str) -> None:
    layer = GaussianAttention(WIDTH, HEADS, bias=bias, value_source=value_source)  # type: ignore[arg-type]
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"log_sigma", "out.weight"} | ({"out.bias"} if bias else set())
    assert sum(p.numel() for p in layer.parameters()) == WIDTH**2 + bias * WIDTH + HEADS
    assert layer.sigma().tolist() == pytest.approx([math.sqrt(WIDTH / HEADS)] * HEADS)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="value_source: got 'input'; allowed: kernel, pre_rope"):
        GaussianAttention.__init__.__wrapped__(
            GaussianAttention.__new__(GaussianAttention), WIDTH, HEADS, value_source="input"
        )
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match=f"initial_sigma: got {sigma}; allowed: more than 0"):
            GaussianAttention(WIDTH, HEADS, initial_sigma=sigma)
