"""Gaussian kernel attention: the card."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kmixer.config import StrictConfig
from kmixer.layers import GaussianAttention
from kmixer.layers.gaussian_attention import ValueSource
from kmixer.models.mixers.card import MixerCard, Place
from kmixer.models.mixers.cost import keys_seen, linear_operations
from kmixer.ops.attention.gaussian import Backend


class GaussianConfig(StrictConfig):
    """Gaussian kernel attention; see `kmixer.layers.GaussianAttention`."""

    value_source: ValueSource = "kernel"
    initial_sigma: Annotated[float, Field(gt=0)] | None = None  # None is the square root of the head width
    head_norm: bool | None = None  # None: where positions rotate, that is in language
    exclude_self: bool = False
    backend: Backend = "auto"


def _build(settings: GaussianConfig, heads: int, place: Place) -> GaussianAttention:
    options = settings.model_dump()
    if options["head_norm"] is None:
        options["head_norm"] = place.rotary
    return GaussianAttention(place.width, heads, **options, **place.seen())


def _operations(layer: GaussianAttention, window: int, *, every_key: bool = False) -> float:
    keys = keys_seen(layer.reach, window, causal=layer.causal, every_key=every_key)
    return linear_operations(layer) + 4 * keys * layer.heads * layer.head_width


def _state_numbers(layer: GaussianAttention) -> tuple[float, int]:
    return (1 + layer.keeps_values) * layer.heads * layer.head_width, 0


CARD = MixerCard(
    name="gaussian",
    settings=GaussianConfig,
    layer=GaussianAttention,
    build=_build,
    operations=_operations,
    state_numbers=_state_numbers,
    state_grows=True,
    sees_both_ways=True,
    has_window=True,
)
