"""How a configuration names its mixers and holds the settings of each: made from the cards of the registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model
from torch import nn

from kmixer.config import StrictConfig, Width
from kmixer.errors import InputError
from kmixer.models.mixers.card import MixerCard, Place
from kmixer.models.mixers.registry import BASELINE, CARDS, CAUSAL_NAMES

if TYPE_CHECKING:
    MixerName = str
else:
    MixerName = Literal[tuple(sorted(CARDS))]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# One name is short for a list of it.
MixerNames = Annotated[tuple[MixerName, ...], Field(min_length=1, strict=False), BeforeValidator(_as_list)]


class _Choice(StrictConfig):
    """Which mixer each layer has; `MixersConfig` adds the settings of each, under its name."""

    mixers: MixerNames = (BASELINE,)  # of the layers in turn, repeated
    heads: Width = 1  # h of every mixer that has heads

    def mixer_of(self, layer: int) -> MixerName:
        """The mixer of layer 0, 1, ..."""
        return self.mixers[layer % len(self.mixers)]

    def card_of(self, layer: int) -> MixerCard[Any, Any]:
        """The card of the mixer of layer 0, 1, ..."""
        return CARDS[self.mixer_of(layer)]

    @property
    def has_heads(self) -> bool:
        """Whether any of its mixers has heads."""
        return any(CARDS[name].has_heads for name in self.mixers)

    @property
    def causal_mixer(self) -> MixerName | None:
        """The first of its mixers that sees the past only; None where all see both ways."""
        return next((name for name in self.mixers if not CARDS[name].sees_both_ways), None)

    @property
    def refuses_causal(self) -> str | None:
        """The first of its mixers that is built for no place that sees the past only, and why; None where all are."""
        refusing = (name for name in self.mixers if CARDS[name].refuses_causal)
        return next((f"{name} {CARDS[name].refuses_causal}" for name in refusing), None)


if TYPE_CHECKING:
    MixersConfig = _Choice
else:
    MixersConfig = create_model(
        "MixersConfig",
        __base__=_Choice,
        __module__=__name__,
        __doc__="Which mixer each layer has, and the settings of each under its name.",
        **{name: (card.settings, card.settings()) for name, card in CARDS.items()},
    )


def build_mixer(name: MixerName, config: MixersConfig, place: Place) -> nn.Module:
    """The mixer of this name, with fresh weights. Raises InputError where it does not fit its place."""
    card = CARDS[name]
    if not place.causal and not card.sees_both_ways:
        raise InputError(f"mixer {name} mixes with the past only; allowed here: {both_ways()}")
    if place.causal and card.refuses_causal:
        raise InputError(f"mixer {name} {card.refuses_causal}; allowed here: {past_only()}")
    layer: nn.Module = card.build(getattr(config, name), config.heads, place)
    return layer


def both_ways() -> str:
    """The names of the mixers that see both ways."""
    return ", ".join(sorted(name for name, card in CARDS.items() if card.sees_both_ways))


def past_only() -> str:
    """The names of the mixers that are built for positions that see the past only."""
    return ", ".join(sorted(CAUSAL_NAMES))


def mixers_in(module: nn.Module) -> Iterator[tuple[MixerCard[Any, Any], Any]]:
    """The mixers of a model with their cards, in its order."""
    for part in module.modules():
        known = next((_BY_LAYER[kind] for kind in type(part).__mro__ if kind in _BY_LAYER), None)
        if known is not None:
            yield known, part


_BY_LAYER: dict[type, MixerCard[Any, Any]] = {card.layer: card for card in CARDS.values()}
