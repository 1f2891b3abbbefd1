"""Hierarchical attention: the card."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kmixer.config import StrictConfig, Taps
from kmixer.layers import HierarchicalAttention
from kmixer.layers.hierarchical_attention import Downsampling, Fusion
from kmixer.models.mixers.card import MixerCard, Place
from kmixer.models.mixers.cost import convolution_operations, keys_seen, linear_operations, tail_numbers


class HierarchicalConfig(StrictConfig):
    """Hierarchical attention; see `kmixer.layers.HierarchicalAttention`."""

    levels: Annotated[int, Field(ge=1, le=31)] = 3  # each halves the positions
    taps: Taps = 4
    downsampling: Downsampling = "depthwise"
    fusion: Fusion = "score"
    fixed_weights: Annotated[tuple[float, ...], Field(strict=False)] | None = None  # of the levels; None trains them
    convolution_head: bool = False


def _build(settings: HierarchicalConfig, heads: int, place: Place) -> HierarchicalAttention:
    return HierarchicalAttention(
        place.width, heads, causal=place.causal, rotary=place.rotary, bias=place.bias, **settings.model_dump()
    )


def _operations(layer: HierarchicalAttention, window: int, *, every_key: bool = False) -> float:
    """Linear maps on coarse rows, scores of every level, values; downsampling."""
    width = layer.heads * layer.head_width
    keys = keys_seen(None, window, causal=layer.causal, every_key=every_key)
    operations = linear_operations(layer.out)
    for level, projection in enumerate(layer.query_key_value):
        part = 0.5**level
        operations += part * linear_operations(projection)
        operations += part * part * 2 * keys * width
        if level < layer.value_levels:
            value_keys = part * part if layer.fusion == "output" else 1.0
            operations += value_keys * 2 * keys * width
    for level, module in enumerate(layer.downsample):
        operations += 0.5 ** (level + 1) * 2 * sum(p.numel() for p in module.parameters())
    return operations + convolution_operations(layer.convolution)


def _state_numbers(layer: HierarchicalAttention) -> tuple[float, int]:
    """A coarse level keeps a row for several tokens, so that a token more is a mean."""
    width, levels = layer.heads * layer.head_width, range(layer.levels)
    keys = sum(width / 2**level for level in levels)
    values = sum(width / 2**level for level in levels[: layer.value_levels])
    tails = (layer.levels - 1) * (layer.taps - 1) * width
    last_queries = layer.levels * width
    return keys + values, last_queries + tails + tail_numbers(layer.convolution)


CARD = MixerCard(
    name="hierarchical",
    settings=HierarchicalConfig,
    layer=HierarchicalAttention,
    build=_build,
    operations=_operations,
    state_numbers=_state_numbers,
    state_grows=True,
    sees_both_ways=True,
    has_window=False,
)
