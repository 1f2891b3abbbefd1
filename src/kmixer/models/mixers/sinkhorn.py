"""Sinkhorn attention: the card."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from kmixer.config import StrictConfig
from kmixer.layers import SinkhornAttention
from kmixer.models.mixers.card import MixerCard, Place
from kmixer.models.mixers.cost import keys_seen, linear_operations
from kmixer.ops.attention.sinkhorn import check_iterations


def _odd(iterations: int) -> int:
    check_iterations(iterations)
    return iterations


class SinkhornConfig(StrictConfig):
    """Sinkhorn attention; see `kmixer.layers.SinkhornAttention`."""

    iterations: Annotated[int, AfterValidator(_odd)] = 5  # half-steps, an odd number; 1 is softmax attention
    tie_query_key: bool = False
    learned_temperature: bool = False  # a factor of the scores in every head
    tolerance: Annotated[float, Field(gt=0)] | None = None  # in evaluation: go on until columns are so near to 1


def _build(settings: SinkhornConfig, heads: int, place: Place) -> SinkhornAttention:
    return SinkhornAttention(
        place.width, heads, causal=place.causal, rotary=place.rotary, bias=place.bias, **settings.model_dump()
    )


def _operations(layer: SinkhornAttention, window: int, *, every_key: bool = False) -> float:
    """Scores and values as softmax attention; of every half-step more the scores again, and an exponential each."""
    keys = keys_seen(None, window, causal=layer.causal, every_key=every_key)
    more = layer.iterations - 1
    return linear_operations(layer) + keys * layer.heads * ((4 + 2 * more) * layer.head_width + more)


def _state_numbers(layer: SinkhornAttention) -> tuple[float, int]:
    return 0, 0


CARD = MixerCard(
    name="sinkhorn",
    settings=SinkhornConfig,
    layer=SinkhornAttention,
    build=_build,
    operations=_operations,
    state_numbers=_state_numbers,
    state_grows=False,
    sees_both_ways=True,
    has_window=False,
    refuses_causal="needs all queries to normalise a key",
)
