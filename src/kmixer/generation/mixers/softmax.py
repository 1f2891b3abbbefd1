"""Softmax attention in a prepared decoding step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kmixer.generation.live_cache import LiveCache
from kmixer.generation.operations import ATTEND, EMBED, Mixed, Place, Program
from kmixer.layers import SoftmaxAttention
from kmixer.layers.softmax_attention import KeyValueCache
from kmixer.state import State


def softmax_operations(program: Program, mixer: SoftmaxAttention, normed: int, mixed: int, place: Place) -> Mixed:
    """Queries, keys and values as one product; gates and value embeddings where there are some; attention."""
    projection, width = mixer.query_key_value, mixer.heads * mixer.head_width
    projected = program.scratch("projected", len(projection.weight))
    program.linear(normed, projected, projection.weight, projection.bias)
    gates = added = -1
    if mixer.gate is not None:
        assert place.table is not None
        gates, added = program.scratch("gates", mixer.heads), program.scratch("value embedding", width)
        program.linear(normed, gates, mixer.gate.weight, mixer.gate.bias)
        program.add(EMBED, output=added, inputs=width, weight=place.table)
    query, key, value = mixer.parts
    live = LiveCache(
        _cache,
        mixer.heads,
        mixer.head_width,
        torch.full((mixer.heads,), 1 / math.sqrt(mixer.head_width)),
        mixer.reach,
        rotary=mixer.rotary,
        dtype=program.cache_dtype,
        apart=True,
        query=query * width,
        key=key * width,
        value=0 if value is None else value * width,
        source=normed if value is None else projected,
        gates=gates,
        added=added,
        normalise=mixer.query_key_norm,
    )
    program.live.append(live)
    program.add(ATTEND, projected, mixed, inputs=len(projection.weight), outputs=width, attention=live.where)
    return Mixed(mixer.out)


def _cache(keys: Tensor, values: Tensor | None, position: Tensor) -> State:
    assert values is not None
    return KeyValueCache(keys, values, position)
