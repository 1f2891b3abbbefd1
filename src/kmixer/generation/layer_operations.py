"""The operations of blocks and their layers, but for their mixers."""

from __future__ import annotations

from typing import cast

from kmixer.errors import InputError
from kmixer.generation.live_weights import LiveWeights
from kmixer.generation.mixers.registry import MIXERS
from kmixer.generation.operations import (
    ADAPT,
    COPY,
    GATE,
    GELU,
    READ_OUT,
    SQUARED_RELU,
    Place,
    Program,
)
from kmixer.generation.panels import padded, whole
from kmixer.layers import K0, K1, FastWeights, FeedForward, SquaredReluFeedForward
from kmixer.layers.block import Block
from kmixer.layers.linear import Linear
from kmixer.layers.norms import NORM_EPS, Derf, DyT, RMSNorm

ACTIVATIONS = {FeedForward: GELU, SquaredReluFeedForward: SQUARED_RELU}


def k1(program: Program, layer: K1, source: int, target: int, place: Place) -> None:
    """K1 from one buffer into another, or the same."""
    normed = program.scratch("normed", place.width)
    program.norm(source, normed, layer.mixing_norm, place.width)
    projection = layer.mixer.projection
    program.linear(normed, target, projection.weight, projection.bias, residual=source)
    _feed_forward(program, layer, target, place)


def block(program: Program, layer: Block, hidden: int, place: Place) -> None:
    """A block, in place."""
    width = place.width
    normed, mixed = program.scratch("normed", width), program.scratch("mixed", width)
    program.norm(hidden, normed, layer.mixing_norm, width)
    out, gate = MIXERS[type(layer.mixer)](program, layer.mixer, normed, mixed, place)
    if place.gates is not None:
        program.match(COPY, place.vector, mixed, inputs=width, weight=place.gates)
    if gate is not None:
        program.linear(normed, mixed, gate.weight, activation=GATE)
    program.linear(mixed, hidden, out.weight, out.bias, residual=hidden)
    _feed_forward(program, layer, hidden, place)


def k0(program: Program, layer: K0, hidden: int) -> None:
    """K0, in place."""
    width = len(layer.gain)
    if isinstance(layer.norm, DyT | Derf):
        program.pointwise(hidden, hidden, layer.joined(layer.norm), width, residual=hidden)
        return
    tensors = {"weight": cast("RMSNorm", layer.norm).weight, "bias": layer.bias, "extra": layer.gain}
    wide = {name: padded(tensor, whole(width)) for name, tensor in tensors.items()}
    program.add(READ_OUT, hidden, hidden, inputs=width, eps=NORM_EPS, **wide)


def _feed_forward(program: Program, block: Block, hidden: int, place: Place) -> None:
    layer = cast("FeedForward | SquaredReluFeedForward", block.feed_forward)
    normed, inner = program.scratch("normed", place.width), program.scratch("inner", len(layer.up.weight))
    program.norm(hidden, normed, block.feed_forward_norm, place.width)
    program.linear(normed, inner, layer.up.weight, layer.up.bias, activation=ACTIVATIONS[type(layer)])
    if layer.fast is None:
        program.linear(inner, hidden, layer.down.weight, layer.down.bias, residual=hidden)
    else:
        _adapt(
            program, layer.fast, layer.down, hidden, normed if layer.fast.source == "hidden" else place.source, inner
        )


def _adapt(program: Program, fast: FastWeights, down: Linear, hidden: int, source: int, inner: int) -> None:
    outputs, inputs = down.weight.shape
    if (fast.width, fast.hidden_width) != (outputs, inputs):
        raise InputError(
            f"the weights of this model do not fit each other: fast weights {fast.hidden_width} to {fast.width} on "
            f"a matrix {inputs} to {outputs} channels"
        )
    live = LiveWeights(fast, down, source)
    program.live.append(live)
    program.add(ADAPT, inner, hidden, inputs=inputs, outputs=outputs, residual=hidden, fast=live.where)
