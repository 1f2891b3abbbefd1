"""Matrices of 16 and 8 bits: a prepared step is that of the model whose matrices are rounded so."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kmixer.generation.panels import PANEL, STEPS, panels, whole
from kmixer.generation.prepared import PreparedDecoder
from kmixer.layers import K2Mixer, gaussian_attention, softmax_attention
from kmixer.layers.heads import after
from kmixer.layers.linear import Linear
from kmixer.models.causal_lm import DecodedIn
from kmixer.state import tensors
from tests.generation.test_prepared import MODELS, compiled, make_model, make_tokens

ROUNDED: tuple[DecodedIn, ...] = ("bfloat16", "int8")
# Without folded matrices, and with a head that is not the embedding's table, which is not rounded.
UNFOLDED: dict[str, dict[str, Any]] = {
    "k-stack": {"head": {"kind": "gelu", "multiplier": 3}, "output_gate": True},
    "softmax": {"kind": "transformer", "heads": 2, "head": {"kind": "untied"}, "windows": "SL", "window": 4},
    "nanochat, k2 and gaussian": {
        "kind": "transformer",
        "heads": 5,
        "mixers": ["k2", "gaussian"],
        "blocks": "nanochat",
        "head": {"kind": "untied"},
    },
}


def rounded(weight: Tensor, precision: DecodedIn) -> Tensor:
    """Weights (outputs, inputs) as the definition rounds them."""
    if precision == "bfloat16":
        return weight.bfloat16().float()
    scale = weight.abs().amax(1, keepdim=True) / STEPS
    return torch.where(scale > 0, (weight / scale).round() * scale, 0)


@torch.no_grad()
def round_matrices(model: nn.Module, precision: DecodedIn) -> None:
    for part in model.modules():
        if isinstance(part, Linear):
            part.weight.copy_(rounded(part.weight, precision))
        if isinstance(part, K2Mixer):
            for matrix in (part.query, part.key):
                matrix.copy_(rounded(matrix.T, precision).T)


def round_keys_and_values(patch: pytest.MonkeyPatch) -> None:
    """What attention of the model itself keeps, and looks at, has 16 bits."""
    for module in (softmax_attention, gaussian_attention):
        patch.setattr(module, "after", lambda past, new: after(past, new.bfloat16().to(new.dtype)))


@compiled
@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("kind", UNFOLDED)
@torch.no_grad()
def test_a_step_is_that_of_the_model_with_rounded_matrices(
    kind: str, precision: DecodedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with rounded keys and values."""
    model, exact = make_model(UNFOLDED[kind]), make_model(UNFOLDED[kind])
    round_matrices(exact, precision)
    tokens = make_tokens(3, 40)
    unrounded = model(tokens).logits
    with monkeypatch.context() as patch:
        round_keys_and_values(patch)
        expected = exact.double()(tokens).logits
    assert expected is not None
    assert unrounded is not None
    decoder = PreparedDecoder(model, model.initial_state(3), precision=precision)
    logits = torch.cat(
        [decoder.advance(tokens[:, :25]), decoder.advance(tokens[:, 25:26]), decoder.read(tokens[:, 26:])], 1
    )
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-3)
    assert (logits - unrounded).abs().max() > 10 * (logits - expected).abs().max()


@compiled
@pytest.mark.parametrize("precision", get_args(DecodedIn))
@pytest.mark.parametrize("kind", ["copies, factorised, gated", "fast weights", "nanochat"])
@torch.no_grad()
def test_pieces_of_any_length_are_the_steps(kind: str, precision: DecodedIn) -> None:
    """Whatever is folded: groups of rows of all sizes, and one after the other."""
    model, tokens = make_model(MODELS[kind]), make_tokens(2, 60)
    steps = PreparedDecoder(model, model.initial_state(2), precision=precision)
    expected = torch.stack([steps.step(tokens[:, t]).clone() for t in range(60)], 1)
    pieces, decoder, start = [], PreparedDecoder(model, model.initial_state(2), precision=precision), 0
    for n in (1, 2, 3, 4, 5, 7, 11, 14, 13):
        pieces.append(decoder.read(tokens[:, start : start + n]))
        decoder.commit(torch.full((2,), n))
        start += n
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(data=st.data())
def test_panels_hold_every_weight_to_half_a_step(data: st.DataObject) -> None:
    outputs, inputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    weight[data.draw(st.integers(0, outputs - 1))] = 0
    packed = panels(weight, bias, "int8")
    many = whole(outputs) // PANEL
    assert packed.shape == (many, PANEL * (inputs + 8))
    steps = packed[:, : PANEL * inputs].contiguous().view(torch.int8).view(many, inputs, PANEL)
    scales, biases = packed[:, PANEL * inputs :].contiguous().view(torch.float32).view(many, 2, PANEL).unbind(1)
    restored = (steps * scales[:, None]).transpose(0, 1).reshape(inputs, -1).T[:outputs]
    half = weight.abs().amax(1, keepdim=True) / STEPS / 2
    assert ((restored - weight).abs() <= 1.001 * half + 1e-12).all()
    assert torch.equal(biases.flatten()[:outputs], bias)
    assert packed.view(torch.int8)[:, : PANEL * inputs].abs().max() <= STEPS


@compiled
@pytest.mark.parametrize("precision", get_args(DecodedIn))
@torch.no_grad()
def test_threads_that_share_the_outputs_of_large_matrices_change_no_bit(precision: DecodedIn) -> None:
    model, tokens = (
        make_model({"head": {"kind": "gelu", "multiplier": 5}, "output_gate": True}, width=240),
        make_tokens(2, 12),
    )
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            decoder = PreparedDecoder(model, model.initial_state(2), precision=precision)
            answers.append(torch.cat([decoder.step(tokens[:, 0])[:, None].clone(), decoder.read(tokens[:, 1:])], 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*answers)


@compiled
@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("kind", ["softmax", "nanochat, k2 and gaussian"])
@torch.no_grad()
def test_a_state_in_float32_holds_the_rounded_keys_and_values(kind: str, precision: DecodedIn) -> None:
    """Taken out and put back, rows go on bit for bit, and a state of full precision is rounded once."""
    model, tokens = make_model(UNFOLDED[kind]), make_tokens(2, 30)
    decoder = PreparedDecoder(model, model(tokens[:, :9]).state, precision=precision)
    decoder.advance(tokens[:, 9:20])
    state = decoder.state()
    assert all(tensor.dtype != torch.bfloat16 for tensor in tensors(state))
    again = PreparedDecoder(model, state, precision=precision)
    torch.testing.assert_close(again.state(), state, rtol=0, atol=0)
    assert torch.equal(again.advance(tokens[:, 20:]), decoder.advance(tokens[:, 20:]))
