"""Fast weights inside feed-forward layers: switched off, reset at intervals, of every kind of layer; their settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kmixer.errors import InputError
from kmixer.layers import FastWeights, FeedForward, GatedFeedForward, SquaredReluFeedForward
from kmixer.layers.adapting import adapting, check_stream
from kmixer.layers.fast_weights import LONGEST_TAU, SHORTEST_TAU, Target
from kmixer.trail import Trail
from tests.layers.test_fast_weights import WIDE, D, forms, inputs, make
from tests.models.laws import assert_close


@forms
def test_switched_off_nothing_is_written_and_what_is_there_is_read(form: dict[str, Any]) -> None:
    layer = FeedForward(D, hidden_width=WIDE, fast=make(**form)).double()
    x, source, _ = inputs(20)
    x = x[..., :D].contiguous()
    with adapting(layer, False):
        y, state = layer(x, None, source)
        assert torch.equal(y, layer.down(layer.hidden(x)))
        assert not state.weights.any()
        _, logs = layer(x, None, source, trail=True)
        assert_close(Trail(logs, 2, 20).at(torch.tensor([3, 20])), state)
    assert layer.fast.adapts
    _, state = layer(x[:, :19], None, source[:, :19])
    with adapting(layer, False):
        y, after = layer(x, state, source)
    assert after is state and not torch.equal(y, layer.down(layer.hidden(x)))


def test_an_interval_of_resets_for_a_while() -> None:
    fast = make(chunk=4)
    layer = FeedForward(D, hidden_width=WIDE, fast=fast).double()
    hidden, targets, weight = inputs(24)
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[:, ::10] = True
    expected, _ = fast(hidden, targets, weight, reset=reset)
    with adapting(layer, True, reset_every=10):
        y, state = fast(hidden, targets, weight)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert state.position.tolist() == [4, 4] and fast.reset_every is None
    with pytest.raises(InputError, match="reset_every: got 0"), adapting(layer, True, reset_every=0):
        pass


def test_a_state_of_no_interval_is_reset_at_once_where_it_is_overdue() -> None:
    fast, (hidden, targets, weight) = make(chunk=4), inputs(24)
    _, state = fast(hidden[:, :17], targets[:, :17], weight)
    with adapting(FeedForward(D, hidden_width=WIDE, fast=fast).double(), True, reset_every=10):
        y, _ = fast(hidden[:, 17:], targets[:, 17:], weight, state)
        expected, _ = fast(hidden[:, 17:], targets[:, 17:], weight)
    assert torch.equal(y, expected)


LAYERS: dict[str, Any] = {"gelu": FeedForward, "squared relu": SquaredReluFeedForward, "gated": GatedFeedForward}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("target", ["embed", "hidden"])
def test_every_feed_forward_layer_takes_them(kind: str, target: Target) -> None:
    layer = LAYERS[kind](D, hidden_width=WIDE, fast=make(chunk=4, target=target)).double()
    x, source, _ = inputs(20)
    x = x[..., :D].contiguous()
    y, state = layer(x, None, source)
    added, expected = layer.fast(layer.hidden(x), x if target == "hidden" else source, layer.down.weight)
    torch.testing.assert_close(y, layer.down(layer.hidden(x)) + added)
    assert_close(state, expected)
    if target == "embed":
        with pytest.raises(InputError, match="source: missing; fast weights with target 'embed'"):
            layer(x)


@given(layer=st.sampled_from([*LAYERS.values()]))
def test_a_zero_filter_is_the_layer_without_bit_for_bit(layer: Any) -> None:
    torch.manual_seed(1)
    one = layer(D, hidden_width=WIDE, fast=FastWeights(D, WIDE, chunk=4))
    x, source, _ = (part.float() for part in inputs(20))
    y, _ = one(x[..., :D], None, source)
    fast, one.fast = one.fast, None
    assert torch.equal(y, one(x[..., :D]))
    with pytest.raises(InputError, match="fast: got fast weights of width 6"):
        layer(D + 1, hidden_width=WIDE, fast=fast)


def test_dropped_units_are_neither_read_nor_written() -> None:
    layer = FeedForward(D, hidden_width=WIDE, dropout=0.5, fast=make(chunk=4)).double().train()
    x, source, _ = inputs(12, b=1)
    x = x[..., :D].contiguous()
    torch.manual_seed(3)
    y, state = layer(x, None, source)
    torch.manual_seed(3)
    dropped = layer.hidden(x)
    assert (dropped == 0).any()
    added, expected = layer.fast(dropped, source, layer.down.weight)
    assert torch.equal(y, layer.down(dropped) + added)
    assert torch.equal(state.weights, expected.weights)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"chunk": 0}, "chunk: got 0"),
        ({"rate": 0.0}, "rate: got 0.0; allowed: above 0"),
        ({"tau": 50.0}, "tau: got 50.0; allowed: between 100 and 100000 tokens, or null"),
        ({"taps": 4}, "taps: got 4 with init 'zero'; allowed: an odd number from 1 on"),
        ({"taps": 1, "init": "next"}, "taps: got 1 with init 'next'; allowed: an odd number from 3 on"),
        ({"max_norm": 0.0}, "max_norm: got 0.0"),
        ({"max_norm": 1.0, "chunk": 1}, "max_norm: got 1.0 with chunk 1"),
        ({"reset_every": 0}, "reset_every: got 0"),
    ],
    ids=str,
)
def test_settings_that_are_not_allowed_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        FastWeights(D, WIDE, **setting)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("chunk", [1, 64])
def test_tau_begins_as_asked_and_stays_in_its_range(chunk: int) -> None:
    fast = FastWeights(D, WIDE, chunk=chunk).double()
    torch.testing.assert_close(fast.tau(), torch.full_like(fast.tau(), 600.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(fast.decay(), torch.full_like(fast.decay(), (1 - 1 / 600) ** chunk), rtol=1e-6, atol=0)
    for extreme in (-100.0, 100.0):
        nn.init.constant_(fast.decay_logit, extreme)
        tau = fast.tau().detach()
        assert SHORTEST_TAU <= float(tau.min()) <= float(tau.max()) <= LONGEST_TAU * (1 + 1e-12)


def test_a_stream_needs_something_that_forgets() -> None:
    for form in ({}, {"tau": None, "reset_every": 8}):
        check_stream(FeedForward(D, hidden_width=WIDE, fast=FastWeights(D, WIDE, **form)))
    layer = FeedForward(D, hidden_width=WIDE, fast=FastWeights(D, WIDE, tau=None))
    with pytest.raises(InputError, match="fast weights with tau = null grow"):
        check_stream(layer)
    with adapting(layer, True, reset_every=100):
        check_stream(layer)
    with adapting(layer, False):
        check_stream(layer)
