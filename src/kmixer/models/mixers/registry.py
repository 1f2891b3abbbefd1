"""The mixers: one line each, which is the name of the mixer and of the file beside this one that holds its card."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kmixer.models.mixers.card import MixerCard

# The first is the default of configurations and the baseline of comparisons.
NAMES = (
    "softmax",
    "gaussian",
    "hierarchical",
    "k2",
    "sinkhorn",
)

CARDS: dict[str, MixerCard[Any, Any]] = {name: import_module(f"kmixer.models.mixers.{name}").CARD for name in NAMES}
BASELINE = NAMES[0]
# Those that a language model can have.
CAUSAL_NAMES = tuple(name for name, card in CARDS.items() if not card.refuses_causal)
