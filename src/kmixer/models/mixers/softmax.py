"""Softmax attention: the card."""

from __future__ import annotations

from kmixer.config import StrictConfig, Taps
from kmixer.layers import SoftmaxAttention
from kmixer.models.mixers.card import MixerCard, Place
from kmixer.models.mixers.cost import convolution_operations, keys_seen, linear_operations, tail_numbers


class SoftmaxConfig(StrictConfig):
    """Softmax attention; see `kmixer.layers.SoftmaxAttention`."""

    query_key_norm: bool = False
    tie_query_key: bool = False
    value_projection: bool = True
    convolution: Taps | None = None  # taps of a causal convolution before queries and keys


def _build(settings: SoftmaxConfig, heads: int, place: Place) -> SoftmaxAttention:
    return SoftmaxAttention(
        place.width, heads, value_embedding=place.value_embedding, **settings.model_dump(), **place.seen()
    )


def _operations(layer: SoftmaxAttention, window: int, *, every_key: bool = False) -> float:
    keys = keys_seen(layer.reach, window, causal=layer.causal, every_key=every_key)
    attention = 4 * keys * layer.heads * layer.head_width
    return linear_operations(layer) + attention + convolution_operations(layer.convolution)


def _state_numbers(layer: SoftmaxAttention) -> tuple[float, int]:
    return 2 * layer.heads * layer.head_width, tail_numbers(layer.convolution)


CARD = MixerCard(
    name="softmax",
    settings=SoftmaxConfig,
    layer=SoftmaxAttention,
    build=_build,
    operations=_operations,
    state_numbers=_state_numbers,
    state_grows=True,
    sees_both_ways=True,
    has_window=True,
    takes_value_embeddings=True,
)
