"""Sinkhorn attention as a layer: one half-step, padding, temperature; more in tests/models/test_mixers.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers import SinkhornAttention, SoftmaxAttention

WIDTH, HEADS = 12, 3


def make(**options: object) -> SinkhornAttention:
    torch.manual_seed(0)
    layer = SinkhornAttention(WIDTH, HEADS, **options).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.query_key_value.weight, std=0.3)
    return layer


def inputs(t: int, b: int = 2) -> Tensor:
    return torch.randn(b, t, WIDTH, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"rotary": True, "bias": True}, {"tie_query_key": True}], ids=str)
def test_with_one_half_step_it_is_the_softmax_layer_also_causal(causal: bool, options: dict[str, bool]) -> None:
    layer = make(iterations=1, causal=causal, **options)
    softmax = SoftmaxAttention(WIDTH, HEADS, causal=causal, **{"rotary": False, **options}).double()
    softmax.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(inputs(9))[0], softmax(inputs(9))[0])
    torch.testing.assert_close(layer.attention_weights(inputs(9)), softmax.attention_weights(inputs(9)))


@pytest.mark.parametrize("t", [1, 2, 17])
def test_it_is_its_weights_times_the_values(t: int) -> None:
    layer, x = make(), inputs(t)
    y, state = layer(x)
    assert state is None
    values = layer.query_key_value(x)[..., 2 * WIDTH :].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = layer.out((layer.attention_weights(x) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected)


def test_padded_rows_are_as_they_are_alone() -> None:
    layer, x, mask = make(), inputs(9), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    x[1, 4:] = 1e3
    y, _ = layer(x, mask=mask)
    torch.testing.assert_close(y[:1], layer(x[:1])[0])
    torch.testing.assert_close(y[1:, :4], layer(x[1:, :4])[0])


def test_tied_queries_and_keys_have_symmetric_scores() -> None:
    """So that near the limit the weights are symmetric too."""
    weights = make(tie_query_key=True, iterations=201).attention_weights(inputs(9))
    torch.testing.assert_close(weights, weights.mT)


def test_a_learned_temperature_starts_at_one_and_flattens_the_weights() -> None:
    layer, plain = make(learned_temperature=True), make()
    torch.testing.assert_close(layer(inputs(9)), plain(inputs(9)))
    assert layer.learned() == {"temperature": [1.0] * HEADS}
    assert plain.learned() == {}
    before = layer.attention_weights(inputs(9)).amax(-1)
    torch.nn.init.constant_(layer.log_temperature, 2.0)  # type: ignore[arg-type]
    assert bool((layer.attention_weights(inputs(9)).amax(-1) < before).all())


def test_the_column_residual_falls_with_the_half_steps() -> None:
    residuals = [make(iterations=n).column_residual(inputs(16)) for n in (1, 3, 5, 51)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.1 > 1e-6 > residuals[-1]
    assert make(iterations=1).column_residual(inputs(1)) < 1e-15


def test_a_tolerance_counts_in_evaluation_only() -> None:
    layer, plain = make(tolerance=1e-12), make()
    torch.testing.assert_close(layer(inputs(16)), plain(inputs(16)))
    assert layer.eval().column_residual(inputs(16)) < 1e-11 < plain.eval().column_residual(inputs(16))


def test_what_does_not_fit_is_named() -> None:
    reason = "sinkhorn needs all queries to normalise a key; allowed: causal = false, or iterations = 1"
    with pytest.raises(InputError, match=reason):
        make(causal=True, iterations=3)
    with pytest.raises(InputError, match="iterations: got 4; allowed: an odd number, 1 or more"):
        make(iterations=4)
    for options in ({"tolerance": 0.0}, {"tolerance": 0.1, "causal": True, "iterations": 1}):
        with pytest.raises(InputError, match=r"tolerance: got .* allowed: more than 0, without causal"):
            make(**options)
    with pytest.raises(InputError, match="mask: a causal layer takes none"):
        make(causal=True, iterations=1)(inputs(3), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="heads: got 5 for width 12"):
        SinkhornAttention(WIDTH, 5)
