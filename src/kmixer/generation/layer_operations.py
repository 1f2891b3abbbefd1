"""The operations of blocks and their layers. A mixer that can be decoded in a prepared step is one line of `MIXERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.generation.live_cache import LiveCache
from kmixer.generation.live_mix import LiveMix
from kmixer.generation.live_weights import LiveWeights
from kmixer.generation.operations import (
    ADAPT,
    ATTEND,
    COPY,
    EMBED,
    GATE,
    GELU,
    MIX,
    READ_OUT,
    SQUARED_RELU,
    Program,
)
from kmixer.generation.panels import RANK_MULTIPLE, padded, whole
from kmixer.layers import (
    K0,
    K1,
    BaseKernel,
    FastWeights,
    FeedForward,
    GaussianAttention,
    K2Mixer,
    SoftmaxAttention,
    SquaredReluFeedForward,
)
from kmixer.layers.block import Block
from kmixer.layers.linear import Linear
from kmixer.layers.norms import NORM_EPS, Derf, DyT, RMSNorm


class Place(NamedTuple):
    """What a stack hands to the layers that it calls.

    Buffers are -1 where there is nothing: `source` of what fast weights learn from, `vector` of what the rows copy,
    which goes through the `gates` of this layer. `table` (v, d) is that of value embeddings.
    """

    width: int
    source: int = -1
    vector: int = -1
    gates: Tensor | None = None
    shared_kernel: BaseKernel | None = None
    table: Tensor | None = None


class Mixed(NamedTuple):
    """What follows what was mixed: a gate on it, of the normed input, and the last matrix."""

    out: Linear
    gate: Linear | None = None


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


def _k2(program: Program, mixer: K2Mixer, normed: int, mixed: int, place: Place) -> Mixed:
    rank = mixer.query.shape[1]
    wide = whole(rank, RANK_MULTIPLE)
    queries = program.scratch("queries", 2 * wide)
    both = torch.cat([padded(mixer.query, wide), padded(mixer.key, wide)], dim=1)
    program.linear(normed, queries, both.T)
    kernel, base = mixer._kernel(place.shared_kernel), None
    if kernel is not None:
        assert mixer.gate_logit is not None
        base = torch.sigmoid(mixer.gate_logit) * kernel.weights[0]
    program.live.append(LiveMix(len(program.list)))
    program.add(
        MIX,
        normed,
        mixed,
        inputs=mixer.query.shape[0],
        weight=padded(mixer.decay(), wide),
        bias=padded(mixer.alpha().expand(rank), wide),
        extra=base,
        rank=rank,
        lags=0 if base is None else len(base),
        queries=queries,
        eps=NORM_EPS,
    )
    return Mixed(mixer.projection, mixer.output_gate)


def _softmax(program: Program, mixer: SoftmaxAttention, normed: int, mixed: int, place: Place) -> Mixed:
    projection, width = mixer.query_key_value, mixer.heads * mixer.head_width
    projected = program.scratch("projected", len(projection.weight))
    program.linear(normed, projected, projection.weight, projection.bias)
    gates = added = -1
    if mixer.gate is not None:
        assert place.table is not None
        gates, added = program.scratch("gates", mixer.heads), program.scratch("value embedding", width)
        program.linear(normed, gates, mixer.gate.weight, mixer.gate.bias)
        program.add(EMBED, output=added, inputs=width, weight=place.table)
    live = LiveCache(mixer, normed if mixer.parts[2] is None else projected, gates=gates, added=added)
    program.live.append(live)
    program.add(ATTEND, projected, mixed, inputs=len(projection.weight), outputs=width, attention=live.where)
    return Mixed(mixer.out)


def _gaussian(program: Program, mixer: GaussianAttention, normed: int, mixed: int, place: Place) -> Mixed:
    live = LiveCache(mixer, normed)
    program.live.append(live)
    program.add(ATTEND, normed, mixed, inputs=place.width, attention=live.where)
    return Mixed(mixer.out)


# From the normed input to what was mixed, before the last matrix.
MIXERS: Mapping[type[nn.Module], Callable[[Program, Any, int, int, Place], Mixed]] = {
    K2Mixer: _k2,
    SoftmaxAttention: _softmax,
    GaussianAttention: _gaussian,
}
ACTIVATIONS = {FeedForward: GELU, SquaredReluFeedForward: SQUARED_RELU}


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
